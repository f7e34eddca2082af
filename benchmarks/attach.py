"""How long it takes to put adapters on a large model: a UNet with the blocks and layers of SDXL's.

    python benchmarks/attach.py [--devices meta cpu] [--width 1.0] [--rounds 3] [--json FILE] [--markdown FILE]

For each device: building the model, `nerine.attach(model, LoRA(rank=16))`, and PEFT's `inject_adapter_in_model` of the
same ranks on the same layers of the same model. README.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from step import header, load
from torch import nn

import nerine

GOAL = 2.0  # seconds for `nerine.attach`
RANK = 16
ADAPTED = (nn.Linear, nn.Conv2d)


# -- the model ---------------------------------------------------------------------------------------------------
class Attention(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])


class TransformerBlock(nn.Module):
    """Attention to itself and to the text, and a gated feed-forward layer: ten linear layers."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1 = Attention(width, width)
        self.attn2 = Attention(width, context)
        self.ff = nn.ModuleList([nn.Linear(width, 8 * width), nn.Dropout(0.0), nn.Linear(4 * width, width)])


class Transformer(nn.Module):
    def __init__(self, width: int, depth: int, context: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(min(32, width), width)
        self.proj_in = nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, context) for _ in range(depth)])
        self.proj_out = nn.Linear(width, width)


class Resnet(nn.Module):
    def __init__(self, inputs: int, width: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, inputs), nn.GroupNorm(1, width)
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if inputs != width:
            self.conv_shortcut = nn.Conv2d(inputs, width, 1)


class Block(nn.Module):
    """Resnets, a transformer after each where `depth` is not 0, and a convolution that changes the size."""

    def __init__(self, inputs: list[int], width: int, depth: int, time: int, context: int, resizes: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(n, width, time) for n in inputs])
        self.attentions = nn.ModuleList([Transformer(width, depth, context) for _ in inputs] if depth else [])
        self.sampler = nn.Conv2d(width, width, 3, padding=1) if resizes else nn.Identity()


class UNet(nn.Module):
    """The modules of SDXL's UNet, 2.57 billion weights at full width; it is never called."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()

        def scaled(channels: int) -> int:
            return max(16, round(channels * width / 16) * 16)

        a, b, c = scaled(320), scaled(640), scaled(1280)
        time, context = c, scaled(2048)
        self.conv_in = nn.Conv2d(4, a, 3, padding=1)
        self.time_embedding = nn.ModuleList([nn.Linear(a, time), nn.Linear(time, time)])
        self.add_embedding = nn.ModuleList([nn.Linear(scaled(2816), time), nn.Linear(time, time)])
        self.down_blocks = nn.ModuleList(
            [
                Block([a, a], a, 0, time, context, True),
                Block([a, b], b, 2, time, context, True),
                Block([b, c], c, 10, time, context, False),
            ]
        )
        self.mid_resnets = nn.ModuleList([Resnet(c, c, time), Resnet(c, c, time)])
        self.mid_attention = Transformer(c, 10, context)
        self.up_blocks = nn.ModuleList(
            [
                Block([c + c, c + c, c + b], c, 10, time, context, True),
                Block([c + b, b + b, b + a], b, 2, time, context, True),
                Block([b + a, a + a, a + a], a, 0, time, context, False),
            ]
        )
        self.conv_norm_out = nn.GroupNorm(1, a)
        self.conv_out = nn.Conv2d(a, 4, 3, padding=1)


def build(device: str, width: float) -> nn.Module:
    """The model on `device` in bf16, filled as PyTorch fills it, frozen."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return UNet(width).requires_grad_(False)
    finally:
        torch.set_default_dtype(usual)


# -- the contestants ---------------------------------------------------------------------------------------------
def attach_nerine(model: nn.Module) -> Callable[[], object]:
    """Adapters on all layers; gives what takes them off again."""
    return nerine.attach(model, nerine.LoRA(rank=RANK)).detach


def inject_peft(model: nn.Module) -> Callable[[], object]:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = [name for name, module in model.named_modules() if isinstance(module, ADAPTED)]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names)
    meta = next(model.parameters()).is_meta
    inject_adapter_in_model(config, model, low_cpu_mem_usage=meta)

    def undo() -> None:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, BaseTunerLayer):
                    setattr(parent, name, child.get_base_layer())
        del model.peft_config

    return undo


@dataclass
class Figures:
    """Times of one contestant on one device."""

    device: str
    what: str
    first_s: float  # the first time, as whoever does it once sees it
    best_s: float
    median_s: float
    of_build: float | None = None  # the first time over that of building the model
    of_peft: float | None = None  # the first time over PEFT's first time
    trained: int = 0  # tensors that ask for a gradient
    goal: float | None = None
    reached: bool | None = None


def timed(act: Callable[[], object]) -> tuple[float, object]:
    gc.collect()
    start = time.perf_counter()
    result = act()
    return time.perf_counter() - start, result


def repeated(device: str, what: str, model: nn.Module, act: Callable[[nn.Module], object], rounds: int) -> Figures:
    """Put the adapters on and take them off again, `rounds` times."""
    seconds, trained = [], 0
    for _ in range(rounds):
        took, undo = timed(lambda: act(model))
        seconds.append(took)
        trained = sum(p.requires_grad for p in model.parameters())
        undo()
    return Figures(device, what, seconds[0], min(seconds), median(seconds), trained=trained)


def measure(device: str, width: float, rounds: int, peers: bool) -> list[Figures]:
    """Building, nerine, PEFT: all on one model."""
    took, model = timed(lambda: build(device, width))
    layers = sum(isinstance(m, ADAPTED) for m in model.modules())
    weights = sum(p.numel() for p in model.parameters())
    print(f"\n{device}: {layers} layers, {weights / 1e9:.2f} billion weights", flush=True)
    building = Figures(device, "building the model", took, took, took)
    mine = repeated(device, "nerine.attach", model, attach_nerine, rounds)
    mine.goal, mine.reached = GOAL, mine.first_s <= GOAL
    found = [building, mine]
    if peers:
        import peft  # noqa: F401  (its import is not what is timed)

        theirs = repeated(device, "PEFT inject", model, inject_peft, rounds)
        mine.of_peft = mine.first_s / theirs.first_s
        found.append(theirs)
        assert mine.trained == theirs.trained == 2 * layers, (mine.trained, theirs.trained, layers)
    for f in found[1:]:
        f.of_build = f.first_s / building.first_s
    return found


# -- output ------------------------------------------------------------------------------------------------------
COLUMNS = ("device", "what", "first s", "best s", "median s", "/ build", "/ PEFT", "goal s", "")


def cells(f: Figures) -> tuple[str, ...]:
    numbers = (f.first_s, f.best_s, f.median_s, f.of_build, f.of_peft, f.goal)
    verdict = "" if f.reached is None else "reached" if f.reached else "not reached"
    return (f.device, f.what, *("" if n is None else f"{n:.2f}" for n in numbers), verdict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", default=["meta", "cpu"], help="meta, cpu, cuda (meta and cpu)")
    parser.add_argument("--width", type=float, default=1.0, help="channels over those of SDXL (1.0: 5.1 GB in bf16)")
    parser.add_argument("--rounds", type=int, default=3, help="how often adapters are put on (3)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (2)")
    parser.add_argument("--no-peers", action="store_true", help="without PEFT")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    head = header(args.rounds) | {"width": str(args.width)}
    print("\n".join(f"{key}: {value}" for key, value in head.items()), flush=True)
    figures: list[Figures] = []
    for device in args.devices:
        found = measure(device, args.width, args.rounds, not args.no_peers)
        figures += found
        lines = [COLUMNS, *map(cells, found)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
        print("\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines), flush=True)
    head["load after"] = load()
    if args.json:
        args.json.write_text(json.dumps({"header": head, "figures": [asdict(f) for f in figures]}, indent=1) + "\n")
    if args.markdown:
        rows = [COLUMNS, ("---",) * len(COLUMNS), *map(cells, figures)]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        title = "# Adapters on a UNet of SDXL's shape"
        args.markdown.write_text(f"{title}\n\n{', '.join(f'{k} {v}' for k, v in head.items())}\n\n{table}\n")


if __name__ == "__main__":
    main()
