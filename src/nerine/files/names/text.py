"""Text encoders of the CLIP kind, whose layers stand below `text_model` in transformers 4 and in files, and not below
it in some classes of transformers 5. Those of the T5 kind are called the same everywhere."""

from __future__ import annotations

from nerine.files.names.alias import Alias, Shapes

__all__ = ["text_aliases"]

_TOPS = ("encoder.layers.", "embeddings.", "final_layer_norm")


def text_aliases(shapes: Shapes) -> dict[str, tuple[Alias, ...]]:
    """The names with or without `text_model`; the former are those of files."""
    if any(path.startswith("text_model.encoder.layers.") for path in shapes):
        lead = "text_model."
        short = tuple(Alias(path[len(lead) :], path) for path in shapes if path.startswith(lead))
        return {"short": short}
    if any(path.startswith("encoder.layers.") and ".self_attn." in path for path in shapes):
        long = tuple(Alias(f"text_model.{path}", path) for path in shapes if path.startswith(_TOPS))
        return {"diffusers": long, "native": long}
    return {}
