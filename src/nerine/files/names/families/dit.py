"""Image transformers with one stream and attention to the text: PixArt and Sana, Lumina 2 and Z-Image."""

from __future__ import annotations

from nerine.files.names.families.base import Family, table

__all__ = ["LUMINA2", "PIXART", "SANA", "Z_IMAGE"]

NAMINGS = ("diffusers", "native")

ATTENTION = table("""
    transformer_blocks.*.attn1.{to_q,to_k,to_v}    blocks.*.attn.qkv
    transformer_blocks.*.attn1.to_out.0            blocks.*.attn.proj
    transformer_blocks.*.attn2.to_q                blocks.*.cross_attn.q_linear
    transformer_blocks.*.attn2.{to_k,to_v}         blocks.*.cross_attn.kv_linear
    transformer_blocks.*.attn2.to_out.0            blocks.*.cross_attn.proj
    caption_projection.linear_1                    y_embedder.y_proj.fc1
    caption_projection.linear_2                    y_embedder.y_proj.fc2
    proj_out                                       final_layer.linear
""")

PIXART = Family(
    "pixart",
    NAMINGS,
    {
        "diffusers": ("transformer_blocks.*.attn1.to_q", "pos_embed.proj", "adaln_single.linear"),
        "native": ("blocks.*.attn.qkv", "blocks.*.cross_attn.kv_linear", "blocks.*.mlp.fc1"),
    },
    (
        *ATTENTION,
        *table("""
            transformer_blocks.*.ff.net.0.proj    blocks.*.mlp.fc1
            transformer_blocks.*.ff.net.2         blocks.*.mlp.fc2
            pos_embed.proj                        x_embedder.proj
            adaln_single.linear                   t_block.1
            adaln_single.emb.timestep_embedder.linear_1       t_embedder.mlp.0
            adaln_single.emb.timestep_embedder.linear_2       t_embedder.mlp.2
            adaln_single.emb.resolution_embedder.linear_1     csize_embedder.mlp.0
            adaln_single.emb.resolution_embedder.linear_2     csize_embedder.mlp.2
            adaln_single.emb.aspect_ratio_embedder.linear_1   ar_embedder.mlp.0
            adaln_single.emb.aspect_ratio_embedder.linear_2   ar_embedder.mlp.2
        """),
    ),
)

SANA = Family(
    "sana",
    NAMINGS,
    {
        "diffusers": ("transformer_blocks.*.attn1.to_q", "transformer_blocks.*.ff.conv_inverted"),
        "native": ("blocks.*.attn.qkv", "blocks.*.cross_attn.kv_linear", "blocks.*.mlp.inverted_conv.conv"),
    },
    (
        *ATTENTION,
        *table("""
            transformer_blocks.*.ff.conv_inverted    blocks.*.mlp.inverted_conv.conv
            transformer_blocks.*.ff.conv_depth       blocks.*.mlp.depth_conv.conv
            transformer_blocks.*.ff.conv_point       blocks.*.mlp.point_conv.conv
            transformer_blocks.*.attn1.norm_q        blocks.*.attn.q_norm
            transformer_blocks.*.attn1.norm_k        blocks.*.attn.k_norm
            transformer_blocks.*.attn2.norm_q        blocks.*.cross_attn.q_norm
            transformer_blocks.*.attn2.norm_k        blocks.*.cross_attn.k_norm
            patch_embed.proj                         x_embedder.proj
            caption_norm                             attention_y_norm
            time_embed.linear                        t_block.1
            time_embed.emb.timestep_embedder.linear_1    t_embedder.mlp.0
            time_embed.emb.timestep_embedder.linear_2    t_embedder.mlp.2
        """),
    ),
)

# Queries have as many heads as the width holds, keys and values may have fewer: `:1`.
LUMINA2 = Family(
    "lumina2",
    NAMINGS,
    {
        "diffusers": ("layers.*.attn.to_q", "time_caption_embed.timestep_embedder.linear_1"),
        "native": ("layers.*.attention.qkv", "cap_embedder.*", "layers.*.adaLN_modulation.1"),
    },
    table(
        """
        <B>.*.attn.{to_q,to_k,to_v}       <B>.*.attention.qkv:1
        <B>.*.attn.to_out.0               <B>.*.attention.out
        <B>.*.attn.norm_q                 <B>.*.attention.q_norm
        <B>.*.attn.norm_k                 <B>.*.attention.k_norm
        <B>.*.feed_forward.linear_1       <B>.*.feed_forward.w1
        <B>.*.feed_forward.linear_2       <B>.*.feed_forward.w2
        <B>.*.feed_forward.linear_3       <B>.*.feed_forward.w3
        <B>.*.norm2                       <B>.*.attention_norm2
        <B>.*.ffn_norm1                   <B>.*.ffn_norm1
        <B>.*.ffn_norm2                   <B>.*.ffn_norm2
        layers.*.norm1.linear             layers.*.adaLN_modulation.1
        layers.*.norm1.norm               layers.*.attention_norm1
        noise_refiner.*.norm1.linear      noise_refiner.*.adaLN_modulation.1
        noise_refiner.*.norm1.norm        noise_refiner.*.attention_norm1
        context_refiner.*.norm1           context_refiner.*.attention_norm1
        time_caption_embed.timestep_embedder.linear_1    t_embedder.mlp.0
        time_caption_embed.timestep_embedder.linear_2    t_embedder.mlp.2
        time_caption_embed.caption_embedder.*            cap_embedder.*
        norm_out.linear_1                 final_layer.adaLN_modulation.1
        norm_out.linear_2                 final_layer.linear
        x_embedder                        x_embedder
        """,
        B=["layers", "noise_refiner", "context_refiner"],
    ),
)

# The number of a patch size (2 x 2 pixels, 1 frame) is part of the name in diffusers.
Z_IMAGE = Family(
    "z-image",
    NAMINGS,
    {
        "diffusers": ("layers.*.attention.to_q", "noise_refiner.*.attention.to_q", "cap_embedder.*"),
        "native": ("layers.*.attention.qkv", "noise_refiner.*.attention.qkv", "layers.*.adaLN_modulation.0"),
    },
    table(
        """
        <B>.*.attention.{to_q,to_k,to_v}    <B>.*.attention.qkv
        <B>.*.attention.to_out.0            <B>.*.attention.out
        <B>.*.attention.norm_q              <B>.*.attention.q_norm
        <B>.*.attention.norm_k              <B>.*.attention.k_norm
        <B>.**                              <B>.**
        all_x_embedder.2-1                  x_embedder
        all_final_layer.2-1.**              final_layer.**
        t_embedder.**                       t_embedder.**
        cap_embedder.**                     cap_embedder.**
        """,
        B=["layers", "noise_refiner", "context_refiner"],
    ),
)
