"""Stable Diffusion 3 and 3.5, and AuraFlow: two streams that attend to each other."""

from __future__ import annotations

from nerine.files.names.families.base import Family, table

__all__ = ["AURAFLOW", "SD3"]

NAMINGS = ("diffusers", "native")

# The context of the last block ends there: its adaptive norm has scale and shift alone, and then diffusers has them in
# the other order.
SD3 = Family(
    "sd3",
    NAMINGS,
    {
        "diffusers": (
            "transformer_blocks.*.attn.add_q_proj",
            "transformer_blocks.*.norm1.linear",
            "pos_embed.proj",
        ),
        "native": ("joint_blocks.*.x_block.attn.qkv", "joint_blocks.*.context_block.attn.qkv"),
    },
    table("""
        transformer_blocks.*.attn.{to_q,to_k,to_v}                      joint_blocks.*.x_block.attn.qkv
        transformer_blocks.*.attn2.{to_q,to_k,to_v}                     joint_blocks.*.x_block.attn2.qkv
        transformer_blocks.*.attn.{add_q_proj,add_k_proj,add_v_proj}    joint_blocks.*.context_block.attn.qkv
        transformer_blocks.*.attn.to_out.0            joint_blocks.*.x_block.attn.proj
        transformer_blocks.*.attn.norm_q              joint_blocks.*.x_block.attn.ln_q
        transformer_blocks.*.attn.norm_k              joint_blocks.*.x_block.attn.ln_k
        transformer_blocks.*.attn2.to_out.0           joint_blocks.*.x_block.attn2.proj
        transformer_blocks.*.attn2.norm_q             joint_blocks.*.x_block.attn2.ln_q
        transformer_blocks.*.attn2.norm_k             joint_blocks.*.x_block.attn2.ln_k
        transformer_blocks.*.attn.to_add_out          joint_blocks.*.context_block.attn.proj
        transformer_blocks.*.attn.norm_added_q        joint_blocks.*.context_block.attn.ln_q
        transformer_blocks.*.attn.norm_added_k        joint_blocks.*.context_block.attn.ln_k
        transformer_blocks.*.ff.net.0.proj            joint_blocks.*.x_block.mlp.fc1
        transformer_blocks.*.ff.net.2                 joint_blocks.*.x_block.mlp.fc2
        transformer_blocks.*.ff_context.net.0.proj    joint_blocks.*.context_block.mlp.fc1
        transformer_blocks.*.ff_context.net.2         joint_blocks.*.context_block.mlp.fc2
        transformer_blocks.*.norm1.linear             joint_blocks.*.x_block.adaLN_modulation.1
        transformer_blocks.*.norm1_context.linear     joint_blocks.*.context_block.adaLN_modulation.1~
        time_text_embed.timestep_embedder.linear_1    t_embedder.mlp.0
        time_text_embed.timestep_embedder.linear_2    t_embedder.mlp.2
        time_text_embed.text_embedder.linear_1        y_embedder.mlp.0
        time_text_embed.text_embedder.linear_2        y_embedder.mlp.2
        pos_embed.proj                                x_embedder.proj
        context_embedder                              context_embedder
        norm_out.linear                               final_layer.adaLN_modulation.1~
        proj_out                                      final_layer.linear
    """),
)

AURAFLOW = Family(
    "auraflow",
    NAMINGS,
    {
        "diffusers": ("joint_transformer_blocks.*.attn.add_q_proj",),
        "native": ("double_layers.*.attn.w1q", "cond_seq_linear"),
    },
    table("""
        joint_transformer_blocks.*.attn.to_q              double_layers.*.attn.w2q
        joint_transformer_blocks.*.attn.to_k              double_layers.*.attn.w2k
        joint_transformer_blocks.*.attn.to_v              double_layers.*.attn.w2v
        joint_transformer_blocks.*.attn.to_out.0          double_layers.*.attn.w2o
        joint_transformer_blocks.*.attn.add_q_proj        double_layers.*.attn.w1q
        joint_transformer_blocks.*.attn.add_k_proj        double_layers.*.attn.w1k
        joint_transformer_blocks.*.attn.add_v_proj        double_layers.*.attn.w1v
        joint_transformer_blocks.*.attn.to_add_out        double_layers.*.attn.w1o
        joint_transformer_blocks.*.ff.linear_1            double_layers.*.mlpX.c_fc1
        joint_transformer_blocks.*.ff.linear_2            double_layers.*.mlpX.c_fc2
        joint_transformer_blocks.*.ff.out_projection      double_layers.*.mlpX.c_proj
        joint_transformer_blocks.*.ff_context.linear_1          double_layers.*.mlpC.c_fc1
        joint_transformer_blocks.*.ff_context.linear_2          double_layers.*.mlpC.c_fc2
        joint_transformer_blocks.*.ff_context.out_projection    double_layers.*.mlpC.c_proj
        joint_transformer_blocks.*.norm1.linear           double_layers.*.modX.1
        joint_transformer_blocks.*.norm1_context.linear   double_layers.*.modC.1
        single_transformer_blocks.*.attn.to_q             single_layers.*.attn.w1q
        single_transformer_blocks.*.attn.to_k             single_layers.*.attn.w1k
        single_transformer_blocks.*.attn.to_v             single_layers.*.attn.w1v
        single_transformer_blocks.*.attn.to_out.0         single_layers.*.attn.w1o
        single_transformer_blocks.*.ff.linear_1           single_layers.*.mlp.c_fc1
        single_transformer_blocks.*.ff.linear_2           single_layers.*.mlp.c_fc2
        single_transformer_blocks.*.ff.out_projection     single_layers.*.mlp.c_proj
        single_transformer_blocks.*.norm1.linear          single_layers.*.modCX.1
        time_step_proj.linear_1    t_embedder.mlp.0
        time_step_proj.linear_2    t_embedder.mlp.2
        context_embedder           cond_seq_linear
        pos_embed.proj             init_x_linear
        norm_out.linear            modF.1~
        proj_out                   final_linear
    """),
)
