"""What LyCORIS's algorithms share: factorizations, Tucker products, and DoRA's rescaling of a finished weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nerine.algorithms.base import FLOOR
from nerine.errors import OptionError, ShapeError, nearest
from nerine.ops.kron import factorize
from nerine.ops.precision import full_precision, wide
from nerine.ops.row_norm import norm_from_square, row_square
from nerine.ops.tucker import tucker

__all__ = [
    "BACKENDS",
    "FUNC_LIST",
    "add_scaled",
    "apply_dora_scale",
    "check_backend",
    "factorization",
    "named",
    "power2factorization",
    "rebuild_tucker",
    "required",
    "tucker_weight",
    "tucker_weight_from_conv",
    "weight_decompose",
]

BACKENDS = ("auto", "torch", "compile", "triton", "tilelang")
FUNC_LIST: list[Callable[..., Tensor] | None] = [
    None,
    None,
    functional.linear,
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
]


def check_backend(backend: str | None) -> None:
    """Whether LyCORIS knows a backend of that name. It decides nothing here.

    Raises:
        OptionError: it does not.
    """
    if backend is not None and str(backend).lower() not in BACKENDS:
        raise OptionError(f"backend: expected None or a name, got {backend!r}. {nearest(str(backend), BACKENDS)}")


def named(weights: tuple[Tensor | None, ...], *names: str) -> tuple[Tensor | None, ...]:
    """The tensors of an adapter, None for those at the end that were not given.

    Raises:
        OptionError: there are too many, or none.
    """
    if not 0 < len(weights) <= len(names):
        raise OptionError(f"expected the tensors {', '.join(names)}, got {len(weights)} of them")
    return (*weights, *[None] * (len(names) - len(weights)))


def required(t: Tensor | None, name: str) -> Tensor:
    """A tensor that cannot be left out.

    Raises:
        OptionError: it was.
    """
    if t is None:
        raise OptionError(f"{name}: expected a tensor, got None")
    return t


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """`dimension` as a product (small, large): `factor` and its cofactor where it divides, else the pair nearest to the
    square root whose smaller part is at most `factor` (no bound where that is negative)."""
    return factorize(dimension, factor) if factor else (1, dimension)


def power2factorization(dimension: int, factor: int = -1) -> tuple[int | None, int]:
    """`dimension` as (an even size of at most `factor`, a power of two), the size as large as can be; -1 is no bound.
    (None, 0) where there is no such pair."""
    most = dimension if factor == -1 else factor
    counts = [1 << j for j in range(dimension.bit_length()) if dimension % (1 << j) == 0]
    fitting = [n for n in counts if (dimension // n) % 2 == 0 and dimension // n <= most]
    return (dimension // fitting[0], fitting[0]) if fitting else (None, 0)


def rebuild_tucker(t: Tensor, wa: Tensor, wb: Tensor) -> Tensor:
    """The kernel `[out, in, *k]` of a core `[p, q, *k]` between `wa` `[p, out]` and `wb` `[q, in]`."""
    return tucker(t, wa.mT, wb)


def tucker_weight(wa: Tensor, wb: Tensor, t: Tensor) -> Tensor:
    """`rebuild_tucker` with its arguments in another order."""
    return tucker(t, wa.mT, wb)


def tucker_weight_from_conv(up: Tensor, down: Tensor, mid: Tensor) -> Tensor:
    """The kernel of three convolutions: `down` `[q, in, 1, ...]`, `mid` `[p, q, *k]` and `up` `[out, p, 1, ...]`."""
    return tucker(mid, up.flatten(1), down.flatten(1))


def add_scaled(base: Tensor, delta: Tensor, gamma: Any = 1.0, backend: str | None = None) -> Tensor:
    """base + gamma·delta."""
    check_backend(backend)
    changed: Tensor = base + delta * gamma
    return changed


def weight_decompose(
    weight: Tensor, dora_scale: Tensor, multiplier: Any = 1, wd_on_out: bool = True, backend: str | None = None
) -> Tensor:
    """DoRA on a finished weight: V·(1 + multiplier·(m/|V| - 1)), in the format of `dora_scale`.

    |V| is that of each output, or without `wd_on_out` of each input channel; computed in at least fp32.

    Raises:
        ShapeError: the magnitudes are not one for each of those.
    """
    check_backend(backend)
    axis = 0 if wd_on_out else 1
    _check_magnitude(weight, dora_scale, axis)
    v = wide(weight)
    gain = _gain(v, dora_scale, axis)
    changed: Tensor = v * (1 + multiplier * (gain - 1))
    return changed.to(dora_scale.dtype)


def apply_dora_scale(org_weight: Tensor, rebuild: Tensor, dora_scale: Tensor, scale: Any) -> Tensor:
    """W + scale·(V·m/|V| - W) with V = W + `rebuild`: a step from the base towards the weight that DoRA makes of it.

    The axis is that of `dora_scale`: `[out, 1, ...]`, else the input channels.

    Raises:
        ShapeError: the magnitudes are those of neither.
    """
    axis = 0 if dora_scale.dim() > 1 and dora_scale.shape[0] == org_weight.shape[0] > 1 else 1
    _check_magnitude(org_weight, dora_scale, axis)
    base, v = wide(org_weight), wide(org_weight) + wide(rebuild)
    changed: Tensor = base + (v * _gain(v, dora_scale, axis) - base) * scale
    return changed.to(torch.promote_types(org_weight.dtype, dora_scale.dtype))


def _check_magnitude(weight: Tensor, magnitude: Tensor, axis: int) -> None:
    if magnitude.numel() != weight.shape[axis]:
        raise ShapeError(
            f"dora_scale: expected {weight.shape[axis]} magnitudes, one for each {('output', 'input channel')[axis]} "
            f"of a weight of shape {tuple(weight.shape)}, found shape {tuple(magnitude.shape)}"
        )


def _gain(v: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    """m/|V| along an axis, shaped to multiply V."""
    with full_precision(v):
        norm = norm_from_square(row_square(v.transpose(0, axis)), FLOOR)
    view = [1] * v.dim()
    view[axis] = -1
    return (wide(magnitude).reshape(-1) / norm).reshape(view)
