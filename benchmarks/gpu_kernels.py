"""Every kernel of `nerine.ops.triton` on a GPU: is it right, and is it faster than its reference?

    python benchmarks/gpu_kernels.py [--rounds 7] [--only rescale kron_linear] [--json FILE]

For each kernel at sizes of SDXL and of a large transformer, in bf16 and fp32: values and gradients beside the reference
in fp64 (with the reference's own error for comparison), then forward and backward timed with CUDA events, contestants
interleaved, the best round of each. Contestants: the kernel, the reference, torch.compile of the reference and, where
LyCORIS is installed and has the same operation, its kernel. Exit code 2 without CUDA, 1 where a kernel is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from gpu_step import race
from torch import Tensor

from nerine.ops.butterfly import added_by_runs, joined_stages
from nerine.ops.cayley import cayley, skew
from nerine.ops.kron import mix_channels
from nerine.ops.rescale import stretch
from nerine.ops.row_norm import low_rank_row_norm
from nerine.ops.triton import kernels

Function = Callable[..., Tensor]
SLACK = 4  # a kernel may err so many times as much as the reference does, and by the rounding of its format
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    """One kernel at one size: `leaves` are its tensors with gradients, `fixed` stand in front of them."""

    name: str
    size: str
    kernel: Function
    reference: Function
    leaves: list[Tensor]
    fixed: tuple[Tensor, ...] = ()
    theirs: Function | None = None


def turned(t: Tensor, matrices: Tensor, offset: Tensor) -> Tensor:
    """As the reference has it under autograd, in any format."""
    n, size, _ = matrices.shape
    blocks = t.reshape(-1, n, size).transpose(0, 1)
    return torch.bmm(blocks, matrices.to(t.dtype)).transpose(0, 1).reshape(t.shape) + offset.to(t.dtype)


def kron_onto(x: Tensor, w1: Tensor, w2: Tensor, base: Tensor) -> Tensor:
    return base + (mix_channels(x, w1.to(x.dtype), -1) @ w2.to(x.dtype).mT).flatten(-2)


def loha(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    return ((a1 * 0.5) @ b1) * (a2 @ b2)


def deviation(t: Tensor, turns: Tensor) -> Tensor:
    return added_by_runs(t, joined_stages(turns), turns.shape[-1])


def draw(*shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * std).to(dtype)


def peers() -> dict[str, Function]:
    """What LyCORIS has for the same operations; its arguments in our order."""
    if not importlib.util.find_spec("lycoris"):
        return {}
    from lycoris.kernels.autograd.boft import boft_bypass_diff
    from lycoris.kernels.autograd.loha import loha_diff_weight
    from lycoris.kernels.autograd.lokr import lokr_kron_bypass

    return {
        "hadamard": lambda a1, b1, a2, b2: loha_diff_weight(b1, a1, b2, a2, gamma=0.5),
        "kron_linear": lambda x, w1, w2, base: lokr_kron_bypass(x, w1, None, None, w2, None, None, base=base),
        "butterfly_deviation": lambda t, blocks: boft_bypass_diff(t, blocks),
    }


def cases(out: int, tokens: int, dtype: torch.dtype, blocks: tuple[int, int]) -> Iterator[Case]:
    """All kernels for a square layer; a butterfly of `blocks` = (n, s)."""
    own, theirs = {name: kernel.function for name, kernel in kernels().items()}, peers()
    size = f"{out}, {tokens} tokens, {str(dtype).removeprefix('torch.')}"
    x, rank = draw(tokens, out, dtype=dtype), 16
    n, s = blocks
    rows = [draw(out, rank, std=0.01), draw(rank, out)]
    yield Case(
        "low_rank_row_norm",
        size,
        lambda w, up, down: own["low_rank_row_norm"](w, up, down, 1.0, 1e-12),
        lambda w, up, down: low_rank_row_norm(w, up, down, 1.0, 1e-12),
        rows,
        (draw(out, out, dtype=dtype, std=0.02),),
    )
    vectors = [1 + draw(out, std=0.01), 1 + draw(out, std=0.01), draw(out)]
    yield Case("stretch", size, lambda *t: own["stretch"](*t, -1), lambda *t: stretch(*t, -1), [x.clone(), *vectors])
    image = draw(4, 320, 64, 64, dtype=dtype)
    yield Case(
        "stretch",
        f"4 of 320 x 64 x 64, {size.split(', ')[-1]}",
        lambda *t: own["stretch"](*t, -3),
        lambda *t: stretch(*t, -3),
        [image, *(v[:320].clone() for v in vectors)],
    )
    turns, many = draw(out // 32, 32, 32, std=0.05), f"{out // 32} of 32 x 32"
    yield Case("cayley", many, lambda b: own["cayley"](skew(b)), lambda b: cayley(skew(b)), [turns])
    matrices = cayley(skew(turns))
    yield Case("turn_channels", size, own["turn_channels"], turned, [x.clone(), matrices, draw(out)])
    yield Case(
        "kron_linear",
        size,
        own["kron_linear"],
        kron_onto,
        [x.clone(), draw(8, 8), draw(out // 8, out // 8, std=0.02), draw(tokens, out, dtype=dtype)],
        theirs=theirs.get("kron_linear"),
    )
    stages = cayley(skew(draw(n.bit_length(), n, s, s, std=0.02)))
    yield Case(
        "butterfly_deviation",
        f"{size}, {n.bit_length()} stages of {n} x {s}",
        own["butterfly_deviation"],
        deviation,
        [x.clone(), stages],
        theirs=theirs.get("butterfly_deviation"),
    )
    factors = [t for _ in range(2) for t in (draw(out, rank, std=0.1), draw(rank, out))]
    hadamard = own["hadamard"]
    yield Case("hadamard", f"{out}", lambda *t: hadamard(*t, 0.5), loha, factors, theirs=theirs.get("hadamard"))


def results(function: Function, case: Case, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The value, and the gradients for one made of it; in `dtype` throughout where one is given."""
    torch.manual_seed(1)
    change = (lambda t: t.to(dtype)) if dtype else (lambda t: t)
    leaves = [change(leaf.detach()).clone().requires_grad_() for leaf in case.leaves]
    y = function(*map(change, case.fixed), *leaves)
    grad = torch.randn(y.shape, device="cuda").to(y.dtype if dtype is None else dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def errors(case: Case) -> tuple[list[float], list[float]]:
    """Of the kernel and of the reference: the largest error of value and gradients, as shares of the largest entry."""
    exact = results(case.reference, case, torch.float64)

    def apart(found: list[Tensor]) -> list[float]:
        pairs = zip(found, exact, strict=True)
        return [float((f.double() - e).abs().max() / e.abs().max().clamp_min(1e-30)) for f, e in pairs]

    return apart(results(case.kernel, case)), apart(results(case.reference, case))


def step(function: Function, case: Case) -> Callable[[], None]:
    """Forward and backward."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in case.leaves]
    grad = torch.randn_like(function(*case.fixed, *leaves))

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        function(*case.fixed, *leaves).backward(grad)

    return run


def contestants(case: Case) -> dict[str, Callable[[], None]]:
    found = {"kernel": step(case.kernel, case), "reference": step(case.reference, case)}
    others = {"compiled": torch.compile(case.reference, dynamic=False)}
    if case.theirs is not None:
        others["LyCORIS"] = case.theirs
    for name, function in others.items():
        try:
            run = step(function, case)
            run()
        except Exception as error:  # another program's failure is a line of the table, not the end of it
            print(f"    {name} fails: {type(error).__name__}: {str(error)[:100]}", flush=True)
        else:
            found[name] = run
    return found


def examine(case: Case, rounds: int) -> dict[str, Any]:
    """Checked and timed: one row."""
    own, theirs = errors(case)
    rounding = max(ROUNDING[t.dtype] for t in (*case.fixed, *case.leaves))
    wrong = [i for i, (a, b) in enumerate(zip(own, theirs, strict=True)) if not a <= SLACK * b + rounding]
    print(f"{case.name}, {case.size}: error {max(own):.1e} (reference {max(theirs):.1e})", flush=True)
    if wrong:
        print(f"    WRONG: {['value', *(f'gradient {i}' for i in range(len(own) - 1))][wrong[0]]}", flush=True)
    times = race(contestants(case), rounds)
    print("    " + ", ".join(f"{name} {time:.0f} µs" for name, time in times.items()), flush=True)
    return {"kernel": case.name, "size": case.size, "errors": own, "reference": theirs, "wrong": wrong, "us": times}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=None, help="names of kernels")
    parser.add_argument("--json", default=None, metavar="FILE")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs CUDA: kernels are compared and timed on a GPU; their tests on a CPU are in tests/unit/ops/triton")
        return 2
    torch.manual_seed(0)
    rows = []
    for out, tokens, blocks in ((1280, 4096, (32, 40)), (3072, 4608, (128, 24))):
        for dtype in (torch.bfloat16, torch.float32):
            for case in cases(out, tokens, dtype, blocks):
                if options.only is None or case.name in options.only:
                    rows.append(examine(case, options.rounds))
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "python": platform.python_version()}
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({**about, "rows": rows}, file, indent=1)
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
