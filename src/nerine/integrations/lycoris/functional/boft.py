"""BOFT over bare tensors: (oft_blocks `[m, n, s, s]`, rescale `[out, 1, ...]` or None).

`scale` multiplies the turn of every stage and the change of each factor: 0 changes nothing, and values between are no
fraction of the whole change. `constraint` is as for Diag-OFT, over all stages.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nerine.errors import OptionError
from nerine.integrations.lycoris.functional.diag_oft import change, check_blocks, outputs, turns
from nerine.integrations.lycoris.functional.general import check_backend, named, power2factorization, required
from nerine.ops.butterfly import butterfly_deviation
from nerine.ops.precision import wide

__all__ = ["bypass_forward_diff", "diff_weight", "weight_gen"]


def weight_gen(
    org_weight: Tensor, max_block_size: int, boft_m: int = -1, rescale: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Blocks of zeros for `org_weight` `[out, ...]`, and with `rescale` a factor of one for each output.

    The size of the blocks is the largest even one up to `max_block_size` (-1: any) of which there is a power of two;
    where all such sizes are larger, the smallest. There are log2(n) + 1 stages, or `boft_m` if that is less.

    Raises:
        OptionError: no even size has a power of two of blocks.
    """
    out, *rest = org_weight.shape
    size, count = power2factorization(out, max_block_size)
    if size is None:
        size, count = _smallest(out)
    most = count.bit_length()
    stages = most if boft_m == -1 else min(boft_m, most)
    like = wide(org_weight.new_empty((0,)))
    gain = like.new_ones((out, *[1] * len(rest))) if rescale else None
    return like.new_zeros((stages, count, size, size)), gain


def _smallest(out: int) -> tuple[int, int]:
    if out % 2:
        raise OptionError(f"boft: {out} outputs do not split into a power of two of blocks of an even size")
    count = (out & -out) // 2
    return out // count, count


def _turns_and_gain(weights: tuple[Tensor | None, ...], constraint: float | None, scale: Any) -> Any:
    """R - I of each stage and the factor of each output, with `scale` in both."""
    blocks, rescale = named(weights, "oft_blocks", "rescale")
    gain = None if rescale is None else 1 + (wide(rescale) - 1) * scale
    return turns(required(blocks, "oft_blocks"), constraint) * scale, gain


def diff_weight(
    org_weight: Tensor,
    *weights: Tensor | None,
    constraint: float | None = None,
    scale: Any = 1,
    backend: str | None = None,
) -> Tensor:
    """rescale ∘ (R_m·…·R_1·W) - W, in at least fp32."""
    check_backend(backend)
    stages, gain = _turns_and_gain(weights, constraint, scale)
    rows = wide(org_weight).movedim(0, -1)
    check_blocks(stages, rows)
    return change(rows, butterfly_deviation(rows, stages), gain).movedim(-1, 0)


def bypass_forward_diff(
    org_out: Tensor,
    *weights: Tensor | None,
    constraint: float | None = None,
    need_transpose: bool = False,
    scale: Any = 1,
    backend: str | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """What `diff_weight` adds to the layer's output `org_out`, in at least fp32; the rest as for Diag-OFT."""
    check_backend(backend)
    stages, gain = _turns_and_gain(weights, constraint, scale)
    y = outputs(org_out, need_transpose, bias)
    check_blocks(stages, y)
    d = change(y, butterfly_deviation(y, stages), gain)
    return d.movedim(-1, 1) if need_transpose else d
