"""Which family of models a set of layers belongs to, and its names in the other implementation.

Families are told by how many of the paths have the names of one, never by classes; a tie is no answer.
"""

from __future__ import annotations

from nerine.files.names.alias import Alias, Shapes
from nerine.files.names.text import text_aliases
from nerine.files.names.transformers import TABLES, Table
from nerine.files.names.unet import unet_aliases, unet_family

__all__ = ["Alias", "aliases", "family_of"]


def family_of(shapes: Shapes) -> str:
    """The name of the family ("sd-unet", "sdxl-unet", "flux", ...); empty where it is none that is known."""
    found = unet_family(shapes)
    if found:
        return found
    table, _ = _table_of(shapes)
    return table.name if table else ""


def aliases(shapes: Shapes) -> dict[str, tuple[Alias, ...]]:
    """{naming: the other names of these layers}; a model with diffusers' names has native ones and the other way
    round. Text encoders have one more naming, of transformers' other major version."""
    if unet_family(shapes):
        return unet_aliases(shapes)
    found = text_aliases(shapes)
    if found:
        return found
    table, naming = _table_of(shapes)
    if table is None:
        return {}
    other = "native" if naming == "diffusers" else "diffusers"
    return {other: table.aliases(shapes, naming)}


def _table_of(shapes: Shapes) -> tuple[Table | None, str]:
    """The family and naming with the most paths, where it has half of them and no other has as many."""
    counts = {(table.name, naming): table.count(shapes, naming) for table in TABLES for naming in table.namings}
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    if not ranked or ranked[0][1] < max(2, len(shapes) / 2):
        return None, ""
    if len(ranked) > 1 and ranked[1][1] == ranked[0][1]:
        return None, ""
    name, naming = ranked[0][0]
    return next(table for table in TABLES if table.name == name), naming
