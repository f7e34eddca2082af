"""optimum-quanto: modules that round their weight in every call, and, once frozen, hold a tensor that is rounded."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nerine.model.storage.kind import Storage, is_named

__all__ = ["QUANTO", "rounds_when_called"]


def rounds_when_called(module: nn.Module) -> bool:
    """Whether the module makes other values of an ordinary weight before it computes with them."""
    return getattr(module, "weight_qtype", None) is not None and is_named(module, "QModuleMixin")


def _read(module: Any, stored: Any) -> Tensor:
    if not is_named(stored, "QTensor"):
        stored = _quantised(module, stored)
    weight: Tensor = stored.detach().dequantize()
    return weight


def _quantised(module: Any, weight: Tensor) -> Any:
    """What the module makes of `weight`: its own rounding, with scales of these values."""
    from optimum.quanto import SymmetricOptimizer, quantize_weight

    weight, qtype, group = weight.detach(), module.weight_qtype, module.weight_group_size
    shift = None
    if isinstance(module.optimizer, SymmetricOptimizer):
        scale = module.optimizer(weight, qtype=qtype, axis=0)
    else:
        scale, shift = module.optimizer(weight, qtype=qtype, axis=0, group_size=group)
    kind = module.activation_qtype
    return quantize_weight(weight, qtype, 0, scale, shift, group_size=group, activation_qtype=kind)


def _write(module: Any, stored: Any, weight: Tensor) -> nn.Parameter:
    weight = weight.to(stored.device, stored.dtype).contiguous()
    is_frozen = is_named(stored, "QTensor")
    return nn.Parameter(_quantised(module, weight) if is_frozen else weight, requires_grad=False)


def _rounds_input(module: Any, stored: Tensor) -> bool:
    return getattr(module, "activation_qtype", None) is not None


QUANTO = Storage(
    "optimum-quanto",
    lambda module, stored: rounds_when_called(module) and (is_named(stored, "QTensor") or stored.dim() > 1),
    _read,
    _write,
    rounds_input=_rounds_input,
)
