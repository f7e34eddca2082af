"""torchao: tensor subclasses in the parameter of an ordinary layer."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from nerine.errors import MergeError
from nerine.model.storage.kind import Storage, is_named

__all__ = ["PACKED", "WRITABLE"]


def _read(module: nn.Module, stored: Any) -> Tensor:
    weight: Tensor = stored.detach().dequantize()
    return weight


def _granularity(stored: Any) -> Any:
    """The way in which values share a scale, by its name in torchao."""
    from torchao.quantization import PerGroup, PerRow, PerTensor

    block, shape = tuple(stored.block_size), tuple(stored.shape)
    if block == shape:
        return PerTensor()
    return PerRow() if block[-1] == shape[-1] else PerGroup(block[-1])


def _write(module: nn.Module, stored: Any, weight: Tensor) -> nn.Parameter:
    kind, weight = type(stored.detach()), weight.to(stored.device, stored.dtype).contiguous()
    mapping = importlib.import_module("torchao.quantization.quant_primitives").MappingType
    if is_named(stored, "Float8Tensor"):
        new = kind.from_hp(
            weight,
            stored.qdata.dtype,
            granularity=_granularity(stored),
            mm_config=stored.mm_config,
            kernel_preference=stored.kernel_preference,
            act_quant_kwargs=stored.act_quant_kwargs,
        )
    else:
        zero = stored.zero_point
        is_even = zero is None or not bool(torch.count_nonzero(zero))
        how = {"mapping_type": mapping.SYMMETRIC if is_even else mapping.ASYMMETRIC}
        if is_named(stored, "Int8Tensor"):
            if stored.act_pre_scale is not None:
                raise MergeError("its torchao tensor scales the input as well (act_pre_scale): dequantise it first")
            kept = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "reduce_range")
            new = kind.from_hp(weight, _granularity(stored), **how, **{name: getattr(stored, name) for name in kept})
        else:
            how["activation_quantization"] = stored.activation_quantization
            new = kind.from_hp(weight, tuple(stored.block_size), stored.target_dtype, **how)
    return nn.Parameter(new, requires_grad=False)


def _rounds_input(module: nn.Module, stored: Any) -> bool:
    rounding = (getattr(stored, name, None) for name in ("act_quant_kwargs", "activation_quantization"))
    return any(how is not None for how in rounding)


_KINDS = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")
WRITABLE = Storage(
    "torchao", lambda module, stored: is_named(stored, *_KINDS), _read, _write, rounds_input=_rounds_input
)
PACKED = Storage(
    "torchao, packed",
    lambda module, stored: is_named(stored, "TorchAOBaseTensor", "AffineQuantizedTensor"),
    _read,
    refusal="its torchao tensor is packed for one kernel and cannot be written anew; quantise the merged model instead "
    "(merge before quantising), or keep the adapter beside it",
    rounds_input=_rounds_input,
)
