"""The words of which the paths of layers are made in diffusers, transformers and the original programs.

One entry is one name between two dots. An entry with dots is a run of names that must be read so although other entries
would read it otherwise: `img_attn.qkv`, where there are models with an `img_attn_qkv`; a star in it is a number. To add
a model, add its names; the tests say which of them now have two readings.
"""

from __future__ import annotations

__all__ = ["WORDS"]

TEXT = """
    2-1 DenseReluDense LayerNorm SelfAttention Wqkv adaLN_mlp_ln adaLN_modulation adaLN_sa_ln adaln_global_mlp
    adaln_modulation adaln_modulation_cross_attn adaln_modulation_mlp adaln_modulation_self_attn adaln_proj adaln_single
    adapter add_embedding add_k_proj add_q_proj add_time_condition add_v_proj after_proj all_final_layer all_x_embedder
    ar_embedder aspect_ratio_embedder attention attention_blocks attention_norm1 attention_norm2 attention_y_norm
    attentions attn attn1 attn2 audio_adaln_single audio_attn1 audio_attn2 audio_caption_projection audio_dec_block
    audio_embeddings audio_ff audio_out_layer audio_patchify_proj audio_pooled_text_embeddings audio_proj_in
    audio_proj_out audio_text_embeddings audio_text_transformer_blocks audio_time_embed audio_time_embeddings
    audio_to_video_attn av_ca_a2v_gate_adaln_single av_ca_audio_scale_shift_adaln_single av_ca_v2a_gate_adaln_single
    av_ca_video_scale_shift_adaln_single av_cross_attention av_cross_attn_audio_scale_shift av_cross_attn_audio_v2a_gate
    av_cross_attn_video_a2v_gate av_cross_attn_video_scale_shift av_modulation base_attentions base_conv_in
    base_conv_norm_out base_conv_out base_downsamplers base_midblock base_resnets base_time_embedding base_to_ctrl
    before_proj beta_proj block block1 block2 blocks body byt5_in c_embedder c_fc c_fc1 c_fc2 c_proj cap_embedder
    caption_embedder caption_norm caption_proj caption_projection channelwise channelwise_linear_1 channelwise_linear_2
    class_embedder class_embedding clf clip_txt_pooled_mapper cond_embed cond_embeds_mapper cond_seq_linear
    cond_type_embed condition_embedder context_block context_embedder context_embedder_2 context_embedder_norm
    context_embedding context_mlp context_refiner control_blocks control_to_base_for_conv_in controlnet_blocks
    controlnet_cond_embedding controlnet_down_blocks controlnet_mid_block controlnet_single_blocks controlnet_x_embedder
    conv conv1 conv1_local conv2 conv3 conv4 conv_1 conv_2 conv_depth conv_in conv_inverted conv_k conv_k_cam
    conv_norm_out conv_out conv_point conv_shortcut conv_skip conv_temp cross_attention cross_attention_proj cross_attn
    cross_attn.norm_k cross_attn.norm_k_img cross_attn.norm_q cross_attn_norm csize_embedder ctrl_attentions
    ctrl_conv_in ctrl_downsamplers ctrl_midblock ctrl_resnets ctrl_to_base decoder default_modulation delta_embedder
    dense dense_4h_to_h dense_h_to_4h depth_conv depthwise distilled_guidance_layer double_blocks
    double_blocks.*.img_attn double_blocks.*.img_attn_k_norm double_blocks.*.img_attn_q_norm double_blocks.*.txt_attn
    double_blocks.*.txt_attn_k_norm double_blocks.*.txt_attn_q_norm double_layers double_stream_blocks
    double_stream_modulation_img double_stream_modulation_txt down down_block down_blocks down_downscalers down_proj
    down_sample downsamplers dwconv early_stream_modulations emb emb_layers embed embed_image_indicator embed_in
    embed_tokens embedding embedding_proj embedding_table embeddings encoder encoder_hid_proj encoder_hidden_states_proj
    encoder_proj encoder_proj_layer_norm experts extra_embedder face_encoder far_patch_embedding fc1 fc2 fc3
    feed_forward ff ff_context ff_i ff_in ff_t ffn ffn_norm ffn_norm1 ffn_norm2 final_layer final_layer_norm
    final_linear final_norm fps_embedding gate gate_layer gate_proj gate_up_proj global_cond_embedder global_proj
    glyph_projector gpt_neox group_norm group_norm_1 group_norm_2 guidance_embedder guidance_in head image image_cond
    image_embedder image_latents_context_embedding image_latents_proj_in image_latents_temporal_encoder image_projector
    img_attn img_attn_k_norm img_attn_proj img_attn_q_norm img_attn_qkv img_emb img_in img_mlp img_mod img_qkv_proj
    in_conv in_layer in_layers in_norm in_proj in_proj_weight individual_token_refiner init_x_linear input_block
    input_blocks input_embed input_embedder input_hint_block input_layernorm input_layernorm_moe_gen input_proj
    intermediate inverted_conv joint_blocks joint_transformer_blocks k k_img k_norm k_norm_cam k_norm_x k_norm_y k_proj
    k_proj_cam k_rms_norm k_rms_norm_t key key_norm kv_linear kv_mapper kv_proj label_emb latent_cond_embedder
    latent_embed layer layer1 layer2 layer_norm layer_norm1 layer_norm2 layernorm layers layerwise_blocks lin linear
    linear1 linear2 linear_1 linear_2 linear_3 linear_fc2 linear_in linear_out llm_adapter llm_cond_norm llm_cond_proj
    lm_head ln_1 ln_2 ln_final ln_k ln_q lyric_encoder mapper mapper_crp mapper_sca mid_block midblock middle_block
    middle_block_out mlm_layer mlp mlpC mlpX mlp_in mlp_moe_gen mlp_norm mlp_out mlp_t5 mlp_x mlp_y mod modC modCX modF
    modX mod_x mod_y mode_blocks model modulation motion_encoder motion_modules motion_network net noise_refiner norm
    norm1 norm1_context norm2 norm3 norm_added_k norm_added_q norm_cross_attn norm_final norm_in norm_k norm_k_img
    norm_mlp norm_moe_gen norm_out norm_out.norm norm_q norm_self_attn norms o o_proj op out out_layer out_layers
    out_norm out_proj out_proj_cam out_projection output output_blocks output_gate output_proj p_embedder patch_embed
    patch_embed_base patch_embedding patch_embeddings patch_long patch_mid patch_short patchify_proj perceiver
    plucker_embedder plucker_proj point_conv pointwise pooled_embedder pooled_text_embeddings pooler pos_embed
    pos_embed_input pos_embed_input.proj pose_patch_embedding position_embedding position_embeddings
    positional_embedding post_attention_layernorm post_attention_layernorm_moe_gen post_feedforward_layernorm
    post_layernorm post_quant_conv postprocess_conv pre_feedforward_layernorm pre_layrnorm preprocess_conv
    prior_projector prior_token_embedding proj proj_attn proj_in proj_in_conv proj_mlp proj_out proj_out_1 proj_out_2
    proj_out_conv proj_to_clip_embeddings proj_x proj_y project project_from_hidden project_from_hidden_norm
    project_to_hidden project_to_hidden_norm projection projection_linear projection_norm projector pwconv1 pwconv2 q
    q_linear q_norm q_norm_cam q_norm_x q_norm_y q_proj q_proj_cam q_rms_norm q_rms_norm_t qkv qkv_proj qkv_x qkv_y
    quant_conv query query_key_value query_norm raymap_embedder redux_down redux_up refiner_blocks
    relative_attention_bias res_blocks resblocks resnet_blocks resnets resnets_in resnets_out resolution_embedder self
    self_attention self_attn self_attn.norm_k self_attn.norm_q self_attn_norm shared shared_experts shortcut_down_sample
    shortcut_projection shortcut_up_sample single_blocks single_layers single_stream_blocks single_stream_modulation
    single_stream_modulations single_transformer_blocks skip_connection skip_linear skip_norm spatial_res_block
    style_embedder t5_y_embedder t5_yproj t_block t_conv t_embedder t_embedding t_embedding_norm temp_attentions
    temp_convs temporal_res_block temporal_transformer_blocks text_conv_layer text_embed text_embedder text_embedding
    text_embeddings text_fusion text_model text_modulation text_norm text_proj text_projection text_projector
    text_transformer_blocks timbre_encoder time_caption_embed time_condition_embed time_emb_proj time_embed time_embed_r
    time_embedder time_embedding time_embeddings time_guidance_embed time_in time_mlp time_mod_proj time_pos_embed
    time_proj time_projection time_r_in time_step_proj time_text_embed timestep_embedder timestep_embedder_r
    timestep_proj to_add_out to_cond_embed to_gate to_global_embed to_k to_k_t to_key to_kv to_local_embed to_out
    to_out_t to_q to_q_t to_qkv to_qkv_mlp_proj to_query to_timestep_embed to_v to_v_t to_value token_embedding
    token_refiner token_type_embeddings transformer transformer_blocks transformer_in transformer_in.norm
    transformer_layers txt txt_attn txt_attn_k_norm txt_attn_proj txt_attn_q_norm txt_attn_qkv txt_in txt_in.norm
    txt_kv_proj txt_mlp txt_mod txt_mode_blocks txt_norm up up_block up_blocks up_connections up_proj up_sample
    up_upscalers upsamplers v v_img v_proj v_proj_cam va_cross_attention va_modulation vace_blocks vace_patch_embedding
    value vector_in video_dec_block video_pooled_text_embeddings video_text_embeddings video_text_transformer_blocks
    video_time_embeddings video_to_audio_attn vision_in vision_model visual_embeddings visual_modulation
    visual_projection visual_transformer_blocks w1 w1k w1o w1q w1v w2 w2k w2o w2q w2v w3 wi wi_0 wi_1 wo word_embeddings
    x_block x_embedder x_embedders y_embedder y_proj zero_convs
"""
WORDS: tuple[str, ...] = tuple(TEXT.split())
