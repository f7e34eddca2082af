"""LyCORIS's tools for single tensors: how much of a difference a low-rank product keeps, hashes of tensors, flags.

`extract_linear` and `extract_conv` cut a difference down to a product as LyCORIS's five modes say. Whole models are
extracted and merged elsewhere: `nerine.tools` and `nerine.load(...).merge()`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nerine.errors import OptionError, ShapeError, nearest
from nerine.integrations.arguments import as_bool
from nerine.ops.precision import full_precision, wide

__all__ = ["extract_conv", "extract_linear", "precalculate_safetensors_hashes", "str_bool"]

MODES = ("full", "fixed", "threshold", "ratio", "quantile", "percentile")
Extracted = tuple[Any, str]


def str_bool(val: Any) -> bool:
    """What a flag from a command line says: "False", "0", "None", "no", "off" and "" are False.

    Raises:
        OptionError: it says neither.
    """
    return as_bool("flag", val)


def precalculate_safetensors_hashes(state_dict: Mapping[str, Tensor]) -> str:
    """The SHA-256 of the bytes of the tensors, one after the other, as "0x...": LyCORIS's `sshs_model_hash`."""
    digest = hashlib.sha256()
    for tensor in state_dict.values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"0x{digest.hexdigest()}"


def extract_linear(weight: Tensor, mode: str = "fixed", mode_param: float = 0, device: Any = "cpu") -> Extracted:
    """A difference of linear weights `[out, in]` as ((down, up, rest), "low rank"), or (difference, "full").

    down is `[rank, in]` and up `[out, rank]`, their product the nearest of its rank; rest is what it leaves. The rank,
    at least 1: "fixed": `mode_param`; "threshold": how many singular values are above it; "ratio": above that part of
    the largest; "quantile": how many it takes for that part of their sum; "full": all. A product of half the outputs or
    more would be larger than the difference, which is given back.

    Raises:
        OptionError: an unknown mode, or a parameter that it cannot take.
        ShapeError: no weight of two dimensions.
    """
    if weight.dim() != 2:
        raise ShapeError(f"extract_linear: expected a weight [out, in], got {tuple(weight.shape)}")
    return _extract(weight.detach().to(device), mode, mode_param, keep=False)


def extract_conv(
    weight: Tensor, mode: str = "fixed", mode_param: float = 0, device: Any = "cpu", is_cp: bool = False
) -> Extracted:
    """The same for a convolution `[out, in, *k]`: down is `[rank, in, *k]` and up `[out, rank, 1, ...]`.

    The rank is at most the number of input channels. With `is_cp` the product is made whatever its rank.

    Raises:
        OptionError: an unknown mode, or a parameter that it cannot take.
        ShapeError: no weight of a convolution.
    """
    if weight.dim() < 3:
        raise ShapeError(f"extract_conv: expected a weight [out, in, *k], got {tuple(weight.shape)}")
    return _extract(weight.detach().to(device), mode, mode_param, keep=is_cp)


def _extract(weight: Tensor, mode: str, param: float, keep: bool) -> Extracted:
    _check(mode, param)
    if mode == "full":
        return weight, "full"
    out, inputs, *kernel = weight.shape
    flat = wide(weight).flatten(1)
    with full_precision(flat):
        u, s, vh = torch.linalg.svd(flat, full_matrices=False)
    rank = min(out, inputs, max(1, _rank(s, mode, param)))
    if rank >= out / 2 and not keep:
        return weight, "full"
    up, down = u[:, :rank] * s[:rank], vh[:rank]
    rest = wide(weight) - (up @ down).reshape(weight.shape)
    shaped = (down.reshape(rank, inputs, *kernel), up.reshape(out, rank, *[1] * len(kernel)), rest)
    return tuple(t.to(weight.dtype) for t in shaped), "low rank"


def _check(mode: str, param: float) -> None:
    if mode not in MODES:
        raise OptionError(f"extract: there is no mode {mode!r}. {nearest(str(mode), MODES)}")
    wrong = {
        "fixed": param != int(param) or param < 0,
        "threshold": param < 0,
        "full": False,
    }.get(mode, not 0 <= param <= 1)
    if wrong:
        expected = {"fixed": "a rank", "threshold": "a number of at least 0"}.get(mode, "a number from 0 to 1")
        raise OptionError(f"extract: mode {mode!r} expects {expected}, got {param!r}")


def _rank(s: Tensor, mode: str, param: float) -> int:
    """How many of the singular values `s`, largest first, are kept."""
    if mode == "fixed":
        return int(param)
    if mode == "threshold":
        return int((s > param).sum())
    if mode == "ratio":
        return int((s > s[0] * param).sum())
    # one more than those whose sum is still short of it; rounding must not ask for one that adds nothing
    short = s.cumsum(0) < param * s.sum() * (1 - torch.finfo(s.dtype).eps * len(s))
    return min(int(short.sum()) + 1, len(s))
