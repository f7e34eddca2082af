"""What one and the same layer is called: `flatten` takes the dots out of a path, as many files do; `families` gives the
names that a layer has in other programs; `unflatten` puts the dots back where there is no model to look in.

Everything here is text and shapes: no tensors, no modules, no class names.
"""

from __future__ import annotations

from nerine.files.names.families import Alias, Family, aliases, family_of, renamed
from nerine.files.names.keys import flatten

__all__ = [
    "Alias",
    "Family",
    "aliases",
    "family_of",
    "flatten",
    "renamed",
]
