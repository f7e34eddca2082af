"""How each kind of diffusion model is called and asked for pictures. One file a family, one line here."""

from __future__ import annotations

from typing import Any

from nerine.errors import UnsupportedBase, nearest
from nerine.train.families.any_transformer import AnyTransformer
from nerine.train.families.base import Base
from nerine.train.families.flux import Flux
from nerine.train.families.sd3 import StableDiffusion3
from nerine.train.families.sdxl import StableDiffusionXL
from nerine.train.families.stable_diffusion import StableDiffusion
from nerine.train.families.tiny import Tiny

__all__ = ["FAMILIES", "Base", "family_of"]

FAMILIES: tuple[type[Base], ...] = (Tiny, StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, AnyTransformer)
_BY_CLASS = {name: family for family in FAMILIES for name in family.classes}


def family_of(pipeline: Any) -> Base:
    """The pipeline as the trainer sees it.

    Raises:
        UnsupportedBase: it is of no family that is known.
    """
    name = type(pipeline).__name__
    if name not in _BY_CLASS:
        raise UnsupportedBase(
            f"{name}: it is not known how this pipeline calls its denoiser, and a guess could train something else. "
            f"{nearest(name, _BY_CLASS)} A family of your own is a subclass of nerine.train.families.Base"
        )
    return _BY_CLASS[name](pipeline)
