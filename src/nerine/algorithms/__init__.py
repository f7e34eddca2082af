"""The registry: one line an algorithm. Adding one is a file beside this and a line here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nerine.algorithms.base import Algorithm, Call, Design, Params, Sandwich, prefers_weight, weight_pays_from
from nerine.algorithms.boft import BOFT
from nerine.algorithms.diag_oft import DiagOFT
from nerine.algorithms.dora import DoRA
from nerine.algorithms.dylora import DyLoRA
from nerine.algorithms.full import Full
from nerine.algorithms.glora import GLoRA
from nerine.algorithms.ia3 import IA3
from nerine.algorithms.loha import LoHa
from nerine.algorithms.lokr import LoKr
from nerine.algorithms.lora import LoRA
from nerine.algorithms.low_rank import LowRank
from nerine.algorithms.norm import Norm
from nerine.algorithms.oft_v2 import OFTv2
from nerine.algorithms.tlora import TLoRA
from nerine.axes import Layout, Shape, Spec
from nerine.errors import OptionError, nearest
from nerine.site import Site

__all__ = [
    "BOFT",
    "IA3",
    "REGISTRY",
    "Algorithm",
    "Call",
    "Design",
    "DiagOFT",
    "DoRA",
    "DyLoRA",
    "Full",
    "GLoRA",
    "Layout",
    "LoHa",
    "LoKr",
    "LoRA",
    "LowRank",
    "Norm",
    "OFTv2",
    "Params",
    "Sandwich",
    "Shape",
    "Site",
    "Spec",
    "TLoRA",
    "build",
    "prefers_weight",
    "weight_pays_from",
]

REGISTRY: Mapping[str, type[Algorithm]] = {
    "lora": LoRA,
    "loha": LoHa,
    "lokr": LoKr,
    "dylora": DyLoRA,
    "tlora": TLoRA,
    "glora": GLoRA,
    "full": Full,
    "norm": Norm,
    "ia3": IA3,
    "diag-oft": DiagOFT,
    "boft": BOFT,
    "oft-v2": OFTv2,
}


def build(settings: Mapping[str, Any], others: Sequence[type[Algorithm]] = ()) -> Algorithm:
    """The algorithm that `settings` (as `Algorithm.settings` gives them) describe; `others` are known beside the
    registry.

    Raises:
        OptionError: an unknown name or setting.
    """
    known = {**REGISTRY, **{other.name: other for other in others}}
    values = dict(settings)
    name = str(values.pop("algorithm", ""))
    if name == DoRA.name:
        return DoRA(build(values.pop("inner", {}), others), **values)
    if name not in known:
        raise OptionError(f"no algorithm is called {name!r}. {nearest(name, [*known, DoRA.name])}")
    return known[name](**values)
