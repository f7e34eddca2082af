"""The registry: one line an algorithm. Adding one is a file beside this and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nerine.algorithms.base import Algorithm, Call, Design, Params, Sandwich, prefers_weight
from nerine.algorithms.dora import DoRA
from nerine.algorithms.loha import LoHa
from nerine.algorithms.lokr import LoKr
from nerine.algorithms.lora import LoRA
from nerine.errors import OptionError, nearest

__all__ = [
    "REGISTRY",
    "Algorithm",
    "Call",
    "Design",
    "DoRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "Params",
    "Sandwich",
    "build",
    "prefers_weight",
]

REGISTRY: Mapping[str, type[Algorithm]] = {
    "lora": LoRA,
    "loha": LoHa,
    "lokr": LoKr,
}


def build(settings: Mapping[str, Any]) -> Algorithm:
    """The algorithm that `settings` (as `Algorithm.settings` gives them) describe.

    Raises:
        OptionError: an unknown name or setting.
    """
    values = dict(settings)
    name = str(values.pop("algorithm", ""))
    if name == DoRA.name:
        return DoRA(build(values.pop("inner", {})), **values)
    if name not in REGISTRY:
        raise OptionError(f"no algorithm is called {name!r}. {nearest(name, [*REGISTRY, DoRA.name])}")
    return REGISTRY[name](**values)
