"""Families of layers, as pictures tell them apart: by name and shape, in whatever program's words."""

from __future__ import annotations

from nerine.tools.inspect.report import LayerRow

__all__ = ["GROUPS", "group_of"]

GROUPS = ("attention", "cross-attention", "feed-forward", "other", "convolution")


def group_of(row: LayerRow) -> str:
    """The family that a layer belongs to, by its name and shape."""
    kind = row.kind.lower()
    if len(row.shape) > 2:
        return "convolution"
    if "attn2" in kind or "cross" in kind or "encoder_attn" in kind:
        return "cross-attention"
    if any(word in kind for word in ("attn", "attention", "to_q", "to_k", "to_v", "qkv", "q_proj", "k_proj", "v_proj")):
        return "attention"
    if any(word in kind.split(".")[0] for word in ("ff", "mlp", "fc", "dense", "linear1", "linear2")):
        return "feed-forward"
    return "other"
