"""CLIP's text encoders.

transformers 4 has everything below `text_model`; in transformers 5 that level is gone from the model without a
projection ("bare" here). OpenCLIP, whence the large ones come, fuses query, key and value, and stores
`text_projection` the other way round (`[in, out]`), which is therefore not the same layer. Its `positional_embedding`
and `in_proj_weight` are bare parameters, without a layer of their own.
"""

from __future__ import annotations

from nerine.files.names.families.base import Family, table

__all__ = ["CLIP_TEXT"]

CLIP_TEXT = Family(
    "clip-text",
    ("transformers", "bare", "open_clip"),
    {
        "transformers": ("text_model.encoder.layers.*.self_attn.q_proj", "text_model.encoder.layers.*.mlp.fc1"),
        "bare": ("encoder.layers.*.self_attn.q_proj", "embeddings.token_embedding"),
        "open_clip": ("transformer.resblocks.*.mlp.c_fc",),
    },
    table(
        """
        text_projection                             text_projection                    -
        text_model.embeddings.token_embedding       embeddings.token_embedding         token_embedding
        text_model.embeddings.position_embedding    embeddings.position_embedding      positional_embedding
        text_model.final_layer_norm                 final_layer_norm                   ln_final
        text_model.<E>.layer_norm1                  <E>.layer_norm1                    <R>.ln_1
        text_model.<E>.layer_norm2                  <E>.layer_norm2                    <R>.ln_2
        text_model.<E>.mlp.fc1                      <E>.mlp.fc1                        <R>.mlp.c_fc
        text_model.<E>.mlp.fc2                      <E>.mlp.fc2                        <R>.mlp.c_proj
        text_model.<E>.self_attn.out_proj           <E>.self_attn.out_proj             <R>.attn.out_proj
        text_model.<E>.self_attn.{<QKV>}            <E>.self_attn.{<QKV>}              <R>.attn.in_proj_weight
        """,
        E=["encoder.layers.*"],
        R=["transformer.resblocks.*"],
        QKV=["q_proj,k_proj,v_proj"],
    ),
)
