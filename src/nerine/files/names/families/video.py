"""Video transformers: Wan, LTX, Mochi and Cosmos 2."""

from __future__ import annotations

from nerine.files.names.families.base import Family, Shapes, Table, table

__all__ = ["COSMOS2", "LTX", "MOCHI", "WAN"]

NAMINGS = ("diffusers", "native")

# diffusers counts the norms in the order in which they run, and so the one before the attention to the text is the
# second; the original counts it last.
WAN = Family(
    "wan",
    NAMINGS,
    {
        "diffusers": ("blocks.*.attn1.to_q", "condition_embedder.time_proj"),
        "native": ("blocks.*.self_attn.q", "blocks.*.cross_attn.q", "time_projection.*"),
    },
    table(
        """
        <B>.*.attn1.to_q            <B>.*.self_attn.q
        <B>.*.attn1.to_k            <B>.*.self_attn.k
        <B>.*.attn1.to_v            <B>.*.self_attn.v
        <B>.*.attn1.to_out.0        <B>.*.self_attn.o
        <B>.*.attn1.norm_q          <B>.*.self_attn.norm_q
        <B>.*.attn1.norm_k          <B>.*.self_attn.norm_k
        <B>.*.attn2.to_q            <B>.*.cross_attn.q
        <B>.*.attn2.to_k            <B>.*.cross_attn.k
        <B>.*.attn2.to_v            <B>.*.cross_attn.v
        <B>.*.attn2.to_out.0        <B>.*.cross_attn.o
        <B>.*.attn2.norm_q          <B>.*.cross_attn.norm_q
        <B>.*.attn2.norm_k          <B>.*.cross_attn.norm_k
        <B>.*.attn2.add_k_proj      <B>.*.cross_attn.k_img
        <B>.*.attn2.add_v_proj      <B>.*.cross_attn.v_img
        <B>.*.attn2.norm_added_k    <B>.*.cross_attn.norm_k_img
        <B>.*.norm2                 <B>.*.norm3
        <B>.*.ffn.net.0.proj        <B>.*.ffn.0
        <B>.*.ffn.net.2             <B>.*.ffn.2
        vace_blocks.*.proj_in       vace_blocks.*.before_proj
        vace_blocks.*.proj_out      vace_blocks.*.after_proj
        patch_embedding             patch_embedding
        vace_patch_embedding        vace_patch_embedding
        condition_embedder.time_embedder.linear_1             time_embedding.0
        condition_embedder.time_embedder.linear_2             time_embedding.2
        condition_embedder.time_proj                          time_projection.1
        condition_embedder.text_embedder.linear_1             text_embedding.0
        condition_embedder.text_embedder.linear_2             text_embedding.2
        condition_embedder.image_embedder.norm1               img_emb.proj.0
        condition_embedder.image_embedder.ff.net.0.proj       img_emb.proj.1
        condition_embedder.image_embedder.ff.net.2            img_emb.proj.3
        condition_embedder.image_embedder.norm2               img_emb.proj.4
        proj_out                    head.head
        """,
        B=["blocks", "vace_blocks"],
    ),
)

LTX = Family(
    "ltx",
    NAMINGS,
    {
        "diffusers": (
            "transformer_blocks.*.attn1.norm_q",
            "transformer_blocks.*.attn2.to_q",
            "proj_in",
            "time_embed.linear",
        ),
        "native": ("transformer_blocks.*.attn1.q_norm", "patchify_proj", "adaln_single.linear"),
    },
    table(
        """
        transformer_blocks.*.<A>.norm_q    transformer_blocks.*.<A>.q_norm
        transformer_blocks.*.<A>.norm_k    transformer_blocks.*.<A>.k_norm
        transformer_blocks.**              transformer_blocks.**
        proj_in                            patchify_proj
        time_embed.**                      adaln_single.**
        audio_proj_in                      audio_patchify_proj
        audio_time_embed.**                audio_adaln_single.**
        av_cross_attn_video_scale_shift.**    av_ca_video_scale_shift_adaln_single.**
        av_cross_attn_video_a2v_gate.**       av_ca_a2v_gate_adaln_single.**
        av_cross_attn_audio_scale_shift.**    av_ca_audio_scale_shift_adaln_single.**
        av_cross_attn_audio_v2a_gate.**       av_ca_v2a_gate_adaln_single.**
        prompt_adaln.**                    prompt_adaln_single.**
        audio_prompt_adaln.**              audio_prompt_adaln_single.**
        caption_projection.**              caption_projection.**
        audio_caption_projection.**        audio_caption_projection.**
        proj_out                           proj_out
        audio_proj_out                     audio_proj_out
        """,
        A=["attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"],
    ),
)


def _last_block(shapes: Shapes, own: str) -> Table:
    """The context of the last block ends there and is only scaled; diffusers has another name for that."""
    head = "transformer_blocks." if own == "diffusers" else "blocks."
    last = max((int(path.split(".")[1]) for path in shapes if path.startswith(head)), default=0)
    return ((f"transformer_blocks.{last}.norm1_context.linear_1", f"blocks.{last}.mod_y"),)


# Value and gate of the feed-forward network stand the other way round.
MOCHI = Family(
    "mochi",
    NAMINGS,
    {
        "diffusers": ("transformer_blocks.*.attn1.add_q_proj", "time_embed.pooler.to_kv"),
        "native": ("blocks.*.attn.qkv_x", "t5_y_embedder.to_kv"),
    },
    table("""
        transformer_blocks.*.attn1.{to_q,to_k,to_v}                      blocks.*.attn.qkv_x
        transformer_blocks.*.attn1.{add_q_proj,add_k_proj,add_v_proj}    blocks.*.attn.qkv_y
        transformer_blocks.*.attn1.to_out.0           blocks.*.attn.proj_x
        transformer_blocks.*.attn1.to_add_out         blocks.*.attn.proj_y
        transformer_blocks.*.attn1.norm_q             blocks.*.attn.q_norm_x
        transformer_blocks.*.attn1.norm_k             blocks.*.attn.k_norm_x
        transformer_blocks.*.attn1.norm_added_q       blocks.*.attn.q_norm_y
        transformer_blocks.*.attn1.norm_added_k       blocks.*.attn.k_norm_y
        transformer_blocks.*.norm1.linear             blocks.*.mod_x
        transformer_blocks.*.norm1_context.linear     blocks.*.mod_y
        transformer_blocks.*.ff.net.0.proj            blocks.*.mlp_x.w1~~
        transformer_blocks.*.ff.net.2                 blocks.*.mlp_x.w2
        transformer_blocks.*.ff_context.net.0.proj    blocks.*.mlp_y.w1~~
        transformer_blocks.*.ff_context.net.2         blocks.*.mlp_y.w2
        time_embed.timestep_embedder.linear_1         t_embedder.mlp.0
        time_embed.timestep_embedder.linear_2         t_embedder.mlp.2
        time_embed.pooler.**                          t5_y_embedder.**
        time_embed.caption_proj                       t5_yproj
        patch_embed.proj                              x_embedder.proj
        norm_out.linear                               final_layer.mod~
        proj_out                                      final_layer.linear
    """),
    _last_block,
)

COSMOS2 = Family(
    "cosmos2",
    NAMINGS,
    {
        "diffusers": (
            "transformer_blocks.*.attn1.norm_q",
            "transformer_blocks.*.norm3.linear_1",
            "time_embed.t_embedder.linear_1",
        ),
        "native": ("blocks.*.self_attn.q_proj", "blocks.*.adaln_modulation_self_attn.*"),
    },
    table("""
        transformer_blocks.*.attn1.to_q        blocks.*.self_attn.q_proj
        transformer_blocks.*.attn1.to_k        blocks.*.self_attn.k_proj
        transformer_blocks.*.attn1.to_v        blocks.*.self_attn.v_proj
        transformer_blocks.*.attn1.to_out.0    blocks.*.self_attn.output_proj
        transformer_blocks.*.attn1.norm_q      blocks.*.self_attn.q_norm
        transformer_blocks.*.attn1.norm_k      blocks.*.self_attn.k_norm
        transformer_blocks.*.attn2.to_q        blocks.*.cross_attn.q_proj
        transformer_blocks.*.attn2.to_k        blocks.*.cross_attn.k_proj
        transformer_blocks.*.attn2.to_v        blocks.*.cross_attn.v_proj
        transformer_blocks.*.attn2.to_out.0    blocks.*.cross_attn.output_proj
        transformer_blocks.*.attn2.norm_q      blocks.*.cross_attn.q_norm
        transformer_blocks.*.attn2.norm_k      blocks.*.cross_attn.k_norm
        transformer_blocks.*.norm1.linear_1    blocks.*.adaln_modulation_self_attn.1
        transformer_blocks.*.norm1.linear_2    blocks.*.adaln_modulation_self_attn.2
        transformer_blocks.*.norm2.linear_1    blocks.*.adaln_modulation_cross_attn.1
        transformer_blocks.*.norm2.linear_2    blocks.*.adaln_modulation_cross_attn.2
        transformer_blocks.*.norm3.linear_1    blocks.*.adaln_modulation_mlp.1
        transformer_blocks.*.norm3.linear_2    blocks.*.adaln_modulation_mlp.2
        transformer_blocks.*.ff.net.0.proj     blocks.*.mlp.layer1
        transformer_blocks.*.ff.net.2          blocks.*.mlp.layer2
        time_embed.t_embedder.linear_1         t_embedder.1.linear_1
        time_embed.t_embedder.linear_2         t_embedder.1.linear_2
        time_embed.norm                        t_embedding_norm
        patch_embed.proj                       x_embedder.proj.1
        norm_out.linear_1                      final_layer.adaln_modulation.1
        norm_out.linear_2                      final_layer.adaln_modulation.2
        proj_out                               final_layer.linear
    """),
)
