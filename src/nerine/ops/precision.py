"""In which number format a computation runs: the one place that answers it, for every algorithm.

Parameters, norms and merges are computed in at least fp32; products with activations run in the format of the
activations (autocast's, where it is on).
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

__all__ = ["compute_dtype", "full_precision", "is_finite", "same_dtype", "wide"]


def wide(t: Tensor) -> Tensor:
    """`t` in at least fp32; fp32 and fp64 tensors pass unchanged."""
    return t if t.dtype in (torch.float32, torch.float64) else t.to(torch.float32)


def is_finite(t: Tensor) -> bool:
    """Whether every entry is a number: the largest or a sum tells, and only where that has overflown each is asked."""
    if t.dtype.itemsize == 2 and t.numel():
        return bool(torch.isfinite(t.abs().amax()))
    total = t.sum(dtype=torch.float64 if t.dtype == torch.float64 else torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(wide(t)).all())


def same_dtype(t: Tensor, x: Tensor) -> Tensor:
    """`t` in the format of the activation `x` (its device is left alone)."""
    return t.to(x.dtype)


def _autocast_on(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The format in which a product with the activation `x` runs: autocast's where it is on, else that of `x`."""
    if _autocast_on(x) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast leaves the computation alone; free where autocast is off."""
    if _autocast_on(x):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
