"""What one and the same layer is called in different programs.

Flattening a path ("a.b_c" -> "a_b_c") cannot be undone, so a name is looked up among those that the layers of a model
can have: their own, and by family of models those of the other implementation ("native", or "diffusers", whose names
the text encoders of transformers share). `unflatten` is for when there is no model: it knows the words that names are
made of.
"""

from __future__ import annotations

from nerine.files.names.families import Alias, aliases, family_of
from nerine.files.names.words import flatten, unflatten

__all__ = ["Alias", "aliases", "family_of", "flatten", "unflatten"]
