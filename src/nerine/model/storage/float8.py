"""Eight-bit floats in an ordinary parameter: alone, or with a scale in a tensor beside it.

The scale multiplies: one number, one for each row, or one for each block of the weight. It goes by `scale_weight` and
`weight_scale` (ComfyUI), `weight_scale` and `weight_scale_inv` (transformers; the last is by blocks, and multiplies
as well in spite of its name).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nerine.errors import MergeError, UnsupportedBase
from nerine.model.storage.kind import Storage

__all__ = ["PLAIN", "SCALED"]

_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")


def _is_float8(module: nn.Module, stored: Tensor) -> bool:
    plain = type(stored) in (Tensor, nn.Parameter)
    return plain and stored.is_floating_point() and stored.dtype.itemsize == 1


def _scale_of(module: nn.Module) -> Tensor | None:
    found = (module._parameters.get(name, module._buffers.get(name)) for name in _SCALES)
    return next((scale for scale in found if scale is not None), None)


def _is_scaled(module: nn.Module, stored: Tensor) -> bool:
    return _is_float8(module, stored) and stored.dim() > 1 and _scale_of(module) is not None


def _spread(module: nn.Module, scale: Tensor, shape: torch.Size) -> Tensor:
    """The scale of each entry, in a form that multiplies a weight of `shape`."""
    scale = scale.detach().to(torch.float32)
    if scale.numel() == 1:
        return scale.reshape(())
    if tuple(scale.shape) in ((shape[0],), (shape[0], *[1] * (len(shape) - 1))):
        return scale.reshape(-1, *[1] * (len(shape) - 1))
    if scale.dim() == len(shape) == 2:
        given = getattr(module, "block_size", None)
        pairs = list(zip(shape, scale.shape, strict=True))
        if given is None and all(size % count == 0 for size, count in pairs):
            given = [size // count for size, count in pairs]
        if given is not None and all(-(-size // block) == n for (size, n), block in zip(pairs, given, strict=True)):
            for dim, (block, size) in enumerate(zip(given, shape, strict=True)):
                scale = scale.repeat_interleave(int(block), dim).narrow(dim, 0, size)
            return scale
    raise UnsupportedBase(
        f"a float8 weight of shape {tuple(shape)} with a scale of shape {tuple(scale.shape)}: expected one number, one "
        "for each row, or one for each block (with `block_size` on the module where blocks do not divide the weight)"
    )


def _scaled(module: nn.Module, stored: Tensor) -> Tensor:
    scale = _scale_of(module)
    assert scale is not None
    return stored.to(torch.float32) * _spread(module, scale, stored.shape)


def _rounded(stored: Tensor, weight: Tensor) -> nn.Parameter:
    """`weight` in the format of `stored`; what is nearest to its largest value counts as that."""
    info = torch.finfo(stored.dtype)
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    if largest > info.max * (1 + info.eps / 4):
        raise MergeError(
            f"the merged weight reaches {largest:.3g} times its scale, and {stored.dtype} ends at {info.max:.3g}: "
            "dequantise the layer first, or keep the adapter beside it"
        )
    limited = weight.clamp(-info.max, info.max)
    return nn.Parameter(limited.to(stored.device, stored.dtype), requires_grad=False)


def _rescaled(module: nn.Module, stored: Tensor, weight: Tensor) -> nn.Parameter:
    """Written with the scale that is there, for the layer goes on reading that one."""
    scale = _scale_of(module)
    assert scale is not None
    return _rounded(stored, weight / _spread(module, scale, stored.shape))


SCALED = Storage("float8 with a scale", _is_scaled, _scaled, _rescaled)
PLAIN = Storage(
    "float8",
    _is_float8,
    lambda module, stored: stored.to(torch.float32),
    lambda module, stored, weight: _rounded(stored, weight),
)
