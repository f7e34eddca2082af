"""torch's shortcut around its own layers: a fused transformer layer reads weights and calls no forward of its parts.

Adapters inside it would be ignored without a word, in eval mode alone. While a layer has adapters below it, the switch
by which torch itself rules the shortcut out is set; it changes nothing else.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from nerine.model.mount import mounts_of

__all__ = ["keep_from_fast_paths", "restore_fast_paths"]

_BEFORE = "_nerine_fast_path"
_SWITCHES: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


def _is_adapted(module: nn.Module) -> bool:
    return any(mounts_of(part) for part in module.modules())


def keep_from_fast_paths(model: nn.Module) -> None:
    """Rule the shortcut out wherever it would pass adapters by."""
    for module in model.modules():
        for kind, switch, off in _SWITCHES:
            if isinstance(module, kind) and _BEFORE not in module.__dict__ and _is_adapted(module):
                module.__dict__[_BEFORE] = module.__dict__.get(switch)
                module.__dict__[switch] = off


def restore_fast_paths(model: nn.Module) -> None:
    """Give the shortcut back to layers without adapters."""
    for module in model.modules():
        for kind, switch, _ in _SWITCHES:
            if isinstance(module, kind) and _BEFORE in module.__dict__ and not _is_adapted(module):
                module.__dict__[switch] = module.__dict__.pop(_BEFORE)
