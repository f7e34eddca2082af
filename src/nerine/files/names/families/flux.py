"""Flux.1, Flux.2, Chroma, HunyuanVideo and HunyuanImage: blocks with two streams, then blocks with one.

The original programs fuse query, key and value (and, with one stream, the way into the feed-forward network) into one
layer, and put shift before scale in the last layer. Their norms of queries and keys call their weight `scale`.
"""

from __future__ import annotations

from nerine.files.names.families.base import Family, table

__all__ = ["CHROMA", "FLUX", "FLUX2", "HUNYUAN_IMAGE", "HUNYUAN_VIDEO"]

NAMINGS = ("diffusers", "native")

DOUBLE_ATTENTION = table("""
    transformer_blocks.*.attn.{to_q,to_k,to_v}                      double_blocks.*.img_attn.qkv
    transformer_blocks.*.attn.{add_q_proj,add_k_proj,add_v_proj}    double_blocks.*.txt_attn.qkv
    transformer_blocks.*.attn.to_out.0        double_blocks.*.img_attn.proj
    transformer_blocks.*.attn.to_add_out      double_blocks.*.txt_attn.proj
    transformer_blocks.*.attn.norm_q          double_blocks.*.img_attn.norm.query_norm
    transformer_blocks.*.attn.norm_k          double_blocks.*.img_attn.norm.key_norm
    transformer_blocks.*.attn.norm_added_q    double_blocks.*.txt_attn.norm.query_norm
    transformer_blocks.*.attn.norm_added_k    double_blocks.*.txt_attn.norm.key_norm
    single_transformer_blocks.*.attn.norm_q   single_blocks.*.norm.query_norm
    single_transformer_blocks.*.attn.norm_k   single_blocks.*.norm.key_norm
""")
FEED_FORWARD = table("""
    transformer_blocks.*.ff.net.0.proj            double_blocks.*.img_mlp.0
    transformer_blocks.*.ff.net.2                 double_blocks.*.img_mlp.2
    transformer_blocks.*.ff_context.net.0.proj    double_blocks.*.txt_mlp.0
    transformer_blocks.*.ff_context.net.2         double_blocks.*.txt_mlp.2
""")
SINGLE = table("""
    single_transformer_blocks.*.{attn.to_q,attn.to_k,attn.to_v,proj_mlp}    single_blocks.*.linear1:3
    single_transformer_blocks.*.proj_out      single_blocks.*.linear2
""")
MODULATION = table("""
    transformer_blocks.*.norm1.linear             double_blocks.*.img_mod.lin
    transformer_blocks.*.norm1_context.linear     double_blocks.*.txt_mod.lin
    single_transformer_blocks.*.norm.linear       single_blocks.*.modulation.lin
    norm_out.linear                               final_layer.adaLN_modulation.1~
""")
ENDS = table("""
    x_embedder          img_in
    context_embedder    txt_in
    proj_out            final_layer.linear
""")

FLUX = Family(
    "flux",
    NAMINGS,
    {
        "diffusers": (
            "transformer_blocks.*.attn.add_q_proj",
            "transformer_blocks.*.norm1.linear",
            "single_transformer_blocks.*.proj_mlp",
        ),
        "native": ("double_blocks.*.img_attn.qkv", "double_blocks.*.img_mod.lin", "single_blocks.*.linear1"),
    },
    (
        *DOUBLE_ATTENTION,
        *FEED_FORWARD,
        *SINGLE,
        *MODULATION,
        *ENDS,
        *table("""
            time_text_embed.timestep_embedder.linear_1    time_in.in_layer
            time_text_embed.timestep_embedder.linear_2    time_in.out_layer
            time_text_embed.text_embedder.linear_1        vector_in.in_layer
            time_text_embed.text_embedder.linear_2        vector_in.out_layer
            time_text_embed.guidance_embedder.linear_1    guidance_in.in_layer
            time_text_embed.guidance_embedder.linear_2    guidance_in.out_layer
        """),
    ),
)

CHROMA = Family(
    "chroma",
    NAMINGS,
    {
        "diffusers": ("distilled_guidance_layer.in_proj", "transformer_blocks.*.attn.add_q_proj"),
        "native": ("distilled_guidance_layer.in_proj", "double_blocks.*.img_attn.qkv"),
    },
    (
        *DOUBLE_ATTENTION,
        *FEED_FORWARD,
        *SINGLE,
        *ENDS,
        *table("""
            distilled_guidance_layer.layers.*.linear_1    distilled_guidance_layer.layers.*.in_layer
            distilled_guidance_layer.layers.*.linear_2    distilled_guidance_layer.layers.*.out_layer
            distilled_guidance_layer.**                   distilled_guidance_layer.**
        """),
    ),
)

FLUX2 = Family(
    "flux2",
    NAMINGS,
    {
        "diffusers": (
            "double_stream_modulation_img.linear",
            "transformer_blocks.*.attn.add_q_proj",
            "single_transformer_blocks.*.attn.to_qkv_mlp_proj",
        ),
        "native": ("double_stream_modulation_img.lin", "double_blocks.*.img_attn.qkv", "single_blocks.*.linear1"),
    },
    (
        *DOUBLE_ATTENTION,
        *ENDS,
        *table("""
            transformer_blocks.*.ff.linear_in             double_blocks.*.img_mlp.0
            transformer_blocks.*.ff.linear_out            double_blocks.*.img_mlp.2
            transformer_blocks.*.ff_context.linear_in     double_blocks.*.txt_mlp.0
            transformer_blocks.*.ff_context.linear_out    double_blocks.*.txt_mlp.2
            single_transformer_blocks.*.attn.to_qkv_mlp_proj    single_blocks.*.linear1
            single_transformer_blocks.*.attn.to_out       single_blocks.*.linear2
            double_stream_modulation_img.linear           double_stream_modulation_img.lin
            double_stream_modulation_txt.linear           double_stream_modulation_txt.lin
            single_stream_modulation.linear               single_stream_modulation.lin
            norm_out.linear                               final_layer.adaLN_modulation.1~
            time_guidance_embed.timestep_embedder.linear_1    time_in.in_layer
            time_guidance_embed.timestep_embedder.linear_2    time_in.out_layer
            time_guidance_embed.guidance_embedder.linear_1    guidance_in.in_layer
            time_guidance_embed.guidance_embedder.linear_2    guidance_in.out_layer
        """),
    ),
)

# In three columns: diffusers; ComfyUI, in Flux's words; the models' own programs.
HUNYUAN_NAMINGS = ("diffusers", "native", "original")
HUNYUAN = table(
    """
    <D>.attn.{to_q,to_k,to_v}                      <d>.img_attn.qkv                   <d>.img_attn_qkv
    <D>.attn.{add_q_proj,add_k_proj,add_v_proj}    <d>.txt_attn.qkv                   <d>.txt_attn_qkv
    <D>.attn.to_out.0                              <d>.img_attn.proj                  <d>.img_attn_proj
    <D>.attn.to_add_out                            <d>.txt_attn.proj                  <d>.txt_attn_proj
    <D>.attn.norm_q                                <d>.img_attn.norm.query_norm       <d>.img_attn_q_norm
    <D>.attn.norm_k                                <d>.img_attn.norm.key_norm         <d>.img_attn_k_norm
    <D>.attn.norm_added_q                          <d>.txt_attn.norm.query_norm       <d>.txt_attn_q_norm
    <D>.attn.norm_added_k                          <d>.txt_attn.norm.key_norm         <d>.txt_attn_k_norm
    <D>.ff.net.0.proj                              <d>.img_mlp.0                      <d>.img_mlp.fc1
    <D>.ff.net.2                                   <d>.img_mlp.2                      <d>.img_mlp.fc2
    <D>.ff_context.net.0.proj                      <d>.txt_mlp.0                      <d>.txt_mlp.fc1
    <D>.ff_context.net.2                           <d>.txt_mlp.2                      <d>.txt_mlp.fc2
    <D>.norm1.linear                               <d>.img_mod.lin                    <d>.img_mod.linear
    <D>.norm1_context.linear                       <d>.txt_mod.lin                    <d>.txt_mod.linear
    <A>.{attn.to_q,attn.to_k,attn.to_v,proj_mlp}   <a>.linear1:3                      <a>.linear1:3
    <A>.proj_out                                   <a>.linear2                        <a>.linear2
    <A>.attn.norm_q                                <a>.norm.query_norm                <a>.q_norm
    <A>.attn.norm_k                                <a>.norm.key_norm                  <a>.k_norm
    <A>.norm.linear                                <a>.modulation.lin                 <a>.modulation.linear
    norm_out.linear                                <f>.adaLN_modulation.1~            <f>.adaLN_modulation.1~
    proj_out                                       <f>.linear                         <f>.linear
    x_embedder.proj                                img_in.proj                        img_in.proj
    context_embedder.proj_in                       txt_in.input_embedder              txt_in.input_embedder
    <C>.<T>.timestep_embedder.linear_1             txt_in.t_embedder.in_layer         txt_in.t_embedder.mlp.0
    <C>.<T>.timestep_embedder.linear_2             txt_in.t_embedder.out_layer        txt_in.t_embedder.mlp.2
    <C>.<T>.text_embedder.linear_1                 txt_in.c_embedder.in_layer         txt_in.c_embedder.linear_1
    <C>.<T>.text_embedder.linear_2                 txt_in.c_embedder.out_layer        txt_in.c_embedder.linear_2
    <R>.{attn.to_q,attn.to_k,attn.to_v}            <r>.self_attn.qkv                  <r>.self_attn_qkv
    <R>.attn.to_out.0                              <r>.self_attn.proj                 <r>.self_attn_proj
    <R>.norm1                                      <r>.norm1                          <r>.norm1
    <R>.norm2                                      <r>.norm2                          <r>.norm2
    <R>.ff.net.0.proj                              <r>.mlp.0                          <r>.mlp.fc1
    <R>.ff.net.2                                   <r>.mlp.2                          <r>.mlp.fc2
    <R>.norm_out.linear                            <r>.adaLN_modulation.1             <r>.adaLN_modulation.1
    """,
    D=["transformer_blocks.*"],
    d=["double_blocks.*"],
    A=["single_transformer_blocks.*"],
    a=["single_blocks.*"],
    C=["context_embedder"],
    f=["final_layer"],
    T=["time_text_embed"],
    R=["context_embedder.token_refiner.refiner_blocks.*"],
    r=["txt_in.individual_token_refiner.blocks.*"],
)

HUNYUAN_VIDEO = Family(
    "hunyuan-video",
    HUNYUAN_NAMINGS,
    {
        "diffusers": (
            "transformer_blocks.*.attn.add_q_proj",
            "single_transformer_blocks.*.proj_mlp",
            "context_embedder.token_refiner.refiner_blocks.*.attn.to_q",
        ),
        "native": ("double_blocks.*.img_attn.qkv", "txt_in.individual_token_refiner.blocks.*.self_attn.qkv"),
        "original": ("double_blocks.*.img_attn_qkv", "txt_in.individual_token_refiner.blocks.*.self_attn_qkv"),
    },
    (
        *HUNYUAN,
        *table("""
            time_text_embed.timestep_embedder.linear_1          time_in.in_layer         time_in.mlp.0
            time_text_embed.timestep_embedder.linear_2          time_in.out_layer        time_in.mlp.2
            time_text_embed.text_embedder.linear_1              vector_in.in_layer       vector_in.in_layer
            time_text_embed.text_embedder.linear_2              vector_in.out_layer      vector_in.out_layer
            time_text_embed.guidance_embedder.linear_1          guidance_in.in_layer     guidance_in.mlp.0
            time_text_embed.guidance_embedder.linear_2          guidance_in.out_layer    guidance_in.mlp.2
        """),
    ),
)

HUNYUAN_IMAGE = Family(
    "hunyuan-image",
    HUNYUAN_NAMINGS,
    {
        "diffusers": (*HUNYUAN_VIDEO.marks["diffusers"], "time_guidance_embed.timestep_embedder.linear_1"),
        "native": (*HUNYUAN_VIDEO.marks["native"], "byt5_in.fc1", "single_blocks.*.linear1"),
        "original": (*HUNYUAN_VIDEO.marks["original"], "byt5_in.fc1", "single_blocks.*.linear1"),
    },
    (
        *HUNYUAN,
        *table("""
            time_guidance_embed.timestep_embedder.linear_1      time_in.in_layer         time_in.mlp.0
            time_guidance_embed.timestep_embedder.linear_2      time_in.out_layer        time_in.mlp.2
            time_guidance_embed.guidance_embedder.linear_1      guidance_in.in_layer     guidance_in.mlp.0
            time_guidance_embed.guidance_embedder.linear_2      guidance_in.out_layer    guidance_in.mlp.2
            time_guidance_embed.timestep_embedder_r.linear_1    time_r_in.in_layer       time_r_in.mlp.0
            time_guidance_embed.timestep_embedder_r.linear_2    time_r_in.out_layer      time_r_in.mlp.2
            context_embedder_2.norm                             byt5_in.layernorm        byt5_in.layernorm
            context_embedder_2.linear_1                         byt5_in.fc1              byt5_in.fc1
            context_embedder_2.linear_2                         byt5_in.fc2              byt5_in.fc2
            context_embedder_2.linear_3                         byt5_in.fc3              byt5_in.fc3
        """),
    ),
)
