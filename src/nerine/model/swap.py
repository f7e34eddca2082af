"""Another adapter in the tensors of one that is attached: its shapes stay, so that compiled code stays valid.

A smaller rank is filled up with zeros, which is exact: every product over ranks gains terms that are zero. What the
new adapter leaves alone gets a deviation of zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nerine.algorithms import Params
from nerine.errors import FormatError
from nerine.model.adapter import Adapter
from nerine.model.sharded import shape_of
from nerine.ops.precision import wide

__all__ = ["check_can_rest", "padded", "rest"]


def padded(adapter: Adapter, params: Params) -> Params:
    """`params` with zeros for the ranks that `adapter` has and they lack; other shapes are left as they are."""
    if set(params.tensors) != set(adapter.names) - {"scalar"}:
        return params
    layout = adapter.algorithm.layout_of(params.tensors)
    lead = 1 if adapter.site.experts else 0
    found: dict[str, Tensor] = {}
    for name, t in params.tensors.items():
        own, room = shape_of(getattr(adapter, name)), [0] * t.dim()
        for axis, word in enumerate(layout.specs[name].words[: t.dim() - lead], lead):
            if word.startswith("rank") and len(own) == t.dim():
                room[axis] = max(0, own[axis] - t.shape[axis])
        found[name] = nn.functional.pad(t, [n for extra in reversed(room) for n in (0, extra)])
    return params.replaced(**found)


@torch.no_grad()
def check_can_rest(adapter: Adapter, weight: Tensor) -> None:
    """Whether the adapter changes nothing once the tensors that carry its size are zero.

    Raises:
        FormatError: it would still change the weight.
    """
    p = adapter.ready(weight.device)
    p = p.replaced(**{name: torch.zeros_like(p.tensors[name]) for name in adapter.carriers})
    if bool(adapter.weight_deviation(p, wide(weight)).any()):
        raise FormatError(
            f"{adapter.where}: the file has no adapter for this layer, and the {adapter.algorithm} that is attached "
            "cannot be filled with zeros; detach it and load the file into the model"
        )


def rest(adapter: Adapter) -> None:
    """Make the deviation zero; the tensors keep their memory."""
    with torch.no_grad():
        adapter.shrink(torch.zeros(()))
