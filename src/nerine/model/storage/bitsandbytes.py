"""bitsandbytes: `Params4bit` (nf4 and fp4), and the two homes of `Int8Params`: the parameter, and after the first call
the state of its layer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from nerine.model.storage.kind import Storage, is_named

__all__ = ["EIGHT_BITS", "FOUR_BITS"]


# -- four bits --------------------------------------------------------------------------------------------------------
def _read_4(module: nn.Module, stored: Any) -> Tensor:
    data, state = stored.data, stored.quant_state
    if state is None:  # not on its device yet, and not rounded
        plain: Tensor = data.as_subclass(Tensor)
        return plain
    import bitsandbytes

    if _is_packed(state):  # the way back changes the state that it is given, which still belongs to the packed weight
        data, state = bitsandbytes.functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
    weight: Tensor = bitsandbytes.functional.dequantize_4bit(data, state)
    return weight.reshape(state.shape)


def _is_packed(state: Any) -> bool:
    """Whether evaluation on a CPU with AVX512-BF16 has packed the weight anew for its products."""
    return bool(getattr(state, "packing_format_for_cpu", False))


def _write_4(module: nn.Module, stored: Any, weight: Tensor) -> nn.Parameter:
    state = stored.quant_state
    dtype = stored.dtype if state is None else state.original_dtype if _is_packed(state) else state.dtype
    new: Any = type(stored)(
        weight.to(dtype),
        requires_grad=False,
        blocksize=stored.blocksize,
        compress_statistics=stored.compress_statistics,
        quant_type=stored.quant_type,
        quant_storage=stored.quant_storage,
    )
    done: nn.Parameter = new if state is None else new._quantize(stored.device)
    return done


FOUR_BITS = Storage("bitsandbytes 4-bit", lambda module, stored: is_named(stored, "Params4bit"), _read_4, _write_4)


# -- eight bits -------------------------------------------------------------------------------------------------------
def _scale(module: Any, stored: Any) -> Tensor:
    """The largest value of each row, from wherever the layer has put it."""
    found: Tensor = stored.SCB if stored.SCB is not None else module.state.SCB
    return found


def _read_8(module: nn.Module, stored: Any) -> Tensor:
    data: Tensor = stored.data.as_subclass(Tensor)
    if data.dtype is not torch.int8:  # not on its device yet, or rounded anew in every call
        return data
    return data.to(torch.float32) * (_scale(module, stored).to(torch.float32) / 127)[:, None]


def _write_8(module: nn.Module, stored: Any, weight: Tensor) -> nn.Parameter:
    if stored.dtype is not torch.int8:
        kept: nn.Parameter = type(stored)(
            weight.to(stored.device, stored.dtype), requires_grad=False, has_fp16_weights=stored.has_fp16_weights
        )
        return kept
    # The layer takes values and scale from whichever parameter has them: the old one gets its own back for that.
    stored.CB, stored.SCB = stored.data, _scale(module, stored)
    new: Any = type(stored)(weight, requires_grad=False, has_fp16_weights=False)
    done: nn.Parameter = new._quantize(stored.device)
    return done


EIGHT_BITS = Storage(
    "bitsandbytes 8-bit",
    lambda module, stored: is_named(stored, "Int8Params"),
    _read_8,
    _write_8,
    rounds_input=lambda module, stored: True,
)
