"""What does not change from run to run in docs/performance.md: what is measured, and what the floors count."""

from __future__ import annotations

__all__ = ["FLOORS", "INTRO", "MEASURED", "OVERHEAD"]

INTRO = """# Performance

<!-- written by benchmarks/suite.py from benchmarks/results/performance.json; `--pages` writes it again -->

All figures are of one machine, in one run of `python benchmarks/suite.py`; a ratio is to the frozen layer without an
adapter, timed in between. `frozen again` is the frozen layer a second time: how far it is from 1 is the noise of the
run. Other machines give other ratios: on a faster matrix unit every pass over memory weighs more.
[devices.md](devices.md) has figures of a GPU, [scaling.md](scaling.md) of many."""

MEASURED = """## What is measured

| column | meaning |
|---|---|
| goal | what we set out to reach for nerine's forward and backward, and whether this run did |
| nerine, by hand, LyCORIS, PEFT | forward and backward, best round over the frozen layer's best round |
| median | of nerine: the median over the rounds of the ratio within a round |
| floor | the ratio that operations and bytes allow, see below; *over* is how far nerine is above it |
| LyCORIS best | the faster of its default mode (it builds the changed weight) and its bypass mode |
| eval | a forward in `eval()` under `no_grad`, which keeps nothing from call to call |
| cached | the same within `network.cached(weights=True)`; the goal for the better of both is {eval_goal:.2f} |
| kept | bytes kept for backward and the input, over those of the frozen layer and the input |
| peak | peak of what a step allocates, over that of the frozen layer |

The input of a layer needs its gradient, as in the middle of a network; weight and bias are frozen, trained tensors are
not at their start. In bf16 layer and input are in bf16, adapters in fp32, under `torch.autocast`. `unet` is diffusers'
UNet2DConditionModel with the blocks of SD1 at a tenth of the width, on latents of 32×32; `block` a
JointTransformerBlock of width 768 on 333 tokens; both have adapters on every Linear and Conv2d. Every output is
compared with a dense reference, in models with the merged model. A star marks who computes something else or only a
part; the notes below the table say what. Rows with `!` had fewer rounds than the others, for they take part in every
second or third round where time is short."""

FLOORS = """## What the floors count

On top of the frozen layer's two products come kernels, each of which reads its operands once and writes its result
once. A kernel takes the longer of its operations at the rate of the frozen layer's own products and its bytes at the
rate of a copy of the output's size, both measured in the same run. The floor is the sum, over the frozen layer's time,
plus one. Nothing of the weight's size is kept for backward; what it needs is built again. Of several exact ways the
cheapest counts. Better kernels than these are possible (a product that applies a gain as it writes, say), so that a
figure under the floor is no error. A forward in eval has the floor 1: the changed weight can be kept.

W is the number of entries of the weight (outputs O, inputs I, taps K), P the positions, X = P·I and Y = P·O the entries
of input and output, r the rank 16, s the size of a block, m the stages of a butterfly. A product of the whole weight is
2·P·W operations; operations are counted as two a multiply-add, passes in entries read and written.

| algorithm | way | operations | passes |
|---|---|---|---|
| LoRA, DyLoRA | beside the layer | 6·P·r·(I·K + O) | 4·X + 4·Y |
| T-LoRA | beside, with the start's half, which is not trained | 10·P·r·(I·K + O) | the same |
| GLoRA | W·a1 first, then rank 2r beside | 4·W·r + 12·P·r·(I·K + O) | 2·W + 4·X + 4·Y |
| | or a changed input (the only one of a convolution), then rank r | 12·P·r·I + 6·P·r·(I·K + O) | 8·X + those of LoRA |
| LoKr | beside: w1 over groups (a×c), w2 (b×d) on them | 6·P·a·c·d + 6·P·a·b·d·K | 4·X + 3·Y + 6·P·a·d |
| | or the weight, twice, and its gradient | 2·P·W + 4·W | 6·W + X + Y |
| LoHa | beside, as one low-rank product of rank r² | 6·P·r²·(I·K + O) | 4·X + 4·Y, and twelve times P·r² |
| | or the weight, twice, its gradient, and those of the factors | 2·P·W + 20·W·r + … | about 25·W |
| Full | the weight, twice, and its gradient | 2·P·W | 7·W + X + 2·Y |
| IA3 | on the output | | 5·Y |
| | or on the weight, twice, and a gradient of the factors | | 4·W + 2·Y |
| IA3 (input) | on the input | | 5·X |
| Diag-OFT | on the output: turn, turn the gradient, gradient of the turns | 6·Y·s | 6·Y |
| | or on the weight, twice, and a gradient of the turns | 4·W·s + 2·Y·s | 4·W + 2·Y |
| BOFT | on the output, stage by stage, of which none is kept | 8·m·Y·s | 8·m·Y |
| | or on the weight | 2·P·W + 10·m·W·s | 11·m·W |
| OFTv2 | on the input | 6·X·s | 6·X |
| | or on the weight (the only one of a convolution) | 2·P·W + 6·W·s | 7·W |
| DoRA around | gains of the outputs and their gradient | | 5·Y more |
| norms for DoRA | LoRA: W·downᵀ, and its gradient | 4·W·r | 2·W |
| | LoKr: W against w2, and its gradient | 4·W | 2·W |
| | LoHa: both products, twice; nothing where the weight is built | 16·W·r | about 16·W |
| | Diag-OFT: W·Wᵀ in blocks never changes | | |

`by hand` is the same map in plain torch with the fewest passes that we know ([step_floor.py]({source}step_floor.py)),
without settings, checks or other formats; it may keep more for backward. The turns have none.
[floor_counts.py]({source}floor_counts.py) has the counts to the letter."""

OVERHEAD = """## Overhead of Python

**One layer.** Linear 128 → 128, 4 tokens, one thread: microseconds beyond the frozen layer, where the arithmetic is
next to nothing. `× by hand` is over those of a LoRA in two lines of plain torch (`x @ A.T @ B.T`, added)."""
