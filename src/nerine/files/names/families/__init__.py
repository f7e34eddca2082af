"""The names that one and the same layer has in different programs, by model family.

A family is recognised by the paths of its layers alone, and only as far as their shapes are needed to cut fused layers
into their pieces: nothing here knows a class name, a size or a number of blocks.
"""

from __future__ import annotations

from nerine.files.names.families.base import Alias, Family, Rows, Shape, Shapes, renamed, starred
from nerine.files.names.families.clip import CLIP_TEXT
from nerine.files.names.families.dit import LUMINA2, PIXART, SANA, Z_IMAGE
from nerine.files.names.families.flux import CHROMA, FLUX, FLUX2, HUNYUAN_IMAGE, HUNYUAN_VIDEO
from nerine.files.names.families.same import HIDREAM, QWEN_IMAGE, T5
from nerine.files.names.families.sd3 import AURAFLOW, SD3
from nerine.files.names.families.unet import CONTROLNET, UNET
from nerine.files.names.families.video import COSMOS2, LTX, MOCHI, WAN

__all__ = ["FAMILIES", "Alias", "Family", "Rows", "Shape", "Shapes", "aliases", "family_of", "renamed"]

FAMILIES = (
    UNET,
    CONTROLNET,
    CLIP_TEXT,
    T5,
    FLUX,
    FLUX2,
    CHROMA,
    SD3,
    AURAFLOW,
    PIXART,
    SANA,
    LUMINA2,
    Z_IMAGE,
    QWEN_IMAGE,
    HIDREAM,
    HUNYUAN_IMAGE,
    HUNYUAN_VIDEO,
    WAN,
    LTX,
    MOCHI,
    COSMOS2,
)


def family_of(shapes: Shapes) -> tuple[Family, str] | None:
    """The family that a model's layers belong to, and the naming that they have.

    All marks of the family are there, and it knows more than half of the layers; of several such families the one that
    knows the most layers, then the one with the most marks.
    """
    patterns = {starred(path) for path in shapes}
    likely = [
        (len(family.known(shapes, naming)), len(family.marks[naming]), family, naming)
        for family in FAMILIES
        for naming in family.namings
        if family.is_likely(shapes, patterns, naming)
    ]
    known, _, family, naming = max(likely, key=lambda one: one[:2], default=(0, 0, UNET, ""))
    return (family, naming) if 2 * known > len(shapes) else None


def aliases(shapes: Shapes) -> dict[str, tuple[Alias, ...]]:
    """{naming: the names of the layers in it}, for every naming but the model's own.

    `shapes` are the weights' shapes `[out, in, *k]` by the layers' paths in their component (in the UNet, in the text
    encoder). A layer without a counterpart has no alias; a layer that is called the same has one with its own name.
    A model of no known family has no namings.
    """
    known = family_of(shapes)
    if known is None:
        return {}
    family, naming = known
    return family.aliases(shapes, naming)
