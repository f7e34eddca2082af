"""Models whose layers have the same names in every program that we know of, or all but the outermost part of them."""

from __future__ import annotations

from nerine.files.names.families.base import Family, table

__all__ = ["HIDREAM", "QWEN_IMAGE", "T5"]

# `encoder.embed_tokens` is `shared` once more: one weight, and one name for it.
T5 = Family(
    "t5-encoder",
    ("transformers", "bare"),  # bare: an encoder that was taken out of its model
    {
        "transformers": ("encoder.block.*.layer.*.SelfAttention.q",),
        "bare": ("block.*.layer.*.SelfAttention.q",),
    },
    table("""
        shared                      embed_tokens
        encoder.block.**            block.**
        encoder.final_layer_norm    final_layer_norm
    """),
)

QWEN_IMAGE = Family(
    "qwen-image",
    ("diffusers", "native"),
    {
        "diffusers": ("transformer_blocks.*.img_mod.*", "transformer_blocks.*.attn.add_q_proj", "txt_norm"),
        "native": (),
    },
    table("**  **"),
)

HIDREAM = Family(
    "hidream",
    ("diffusers", "native"),
    {
        "diffusers": ("double_stream_blocks.*.block.attn1.to_q", "single_stream_blocks.*.block.attn1.to_q"),
        "native": (),
    },
    table("**  **"),
)
