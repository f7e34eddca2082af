"""Every family of models that diffusers and transformers have, small and without memory: for what presets choose there.

`DENOISERS` and `LANGUAGE` say how to build them, by the name in the table of docs/targets.md. `EXCEPTIONS` are classes
among diffusers' denoisers that are left out, with the reason.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from meta_models import DIFFUSERS, MODERN, T5, TEXT, TRANSFORMERS, UNETS, make

Settings = dict[str, Any]

DENOISERS: dict[str, tuple[str, Settings]] = {
    "Stable Diffusion 1": ("UNet2DConditionModel", UNETS["sd1"]),
    "Stable Diffusion 2": ("UNet2DConditionModel", UNETS["sd2"]),
    "SDXL": ("UNet2DConditionModel", UNETS["sdxl"]),
    "SD3": DIFFUSERS["sd3"],
    "SD3.5": DIFFUSERS["sd3.5"],
    "ACE-Step": ("AceStepTransformer1DModel", {"num_hidden_layers": 2}),
    "Allegro": ("AllegroTransformer3DModel", {}),
    "AnyFlow": ("AnyFlowTransformer3DModel", {}),
    "AnyFlow FAR": ("AnyFlowFARTransformer3DModel", {}),
    "AuraFlow": ("AuraFlowTransformer2DModel", {}),
    "Bria": ("BriaTransformer2DModel", {}),
    "Bria FIBO": ("BriaFiboTransformer2DModel", {}),
    "Bria FIBO 2": ("BriaFibo2Transformer2DModel", {}),
    "Chroma": ("ChromaTransformer2DModel", {}),
    "ChronoEdit": ("ChronoEditTransformer3DModel", {}),
    "CogVideoX": ("CogVideoXTransformer3DModel", {}),
    "CogView3+": ("CogView3PlusTransformer2DModel", {}),
    "CogView4": ("CogView4Transformer2DModel", {}),
    "ConsisID": ("ConsisIDTransformer3DModel", {}),
    "Cosmos": ("CosmosTransformer3DModel", {}),
    "Cosmos 3": ("Cosmos3OmniTransformer", {"num_hidden_layers": 2}),
    "DiT": ("DiTTransformer2DModel", {}),
    "DreamLite": ("DreamLiteUNetModel", {}),
    "EasyAnimate": ("EasyAnimateTransformer3DModel", {"in_channels": 4, "out_channels": 4, "patch_size": 2}),
    "ERNIE-Image": ("ErnieImageTransformer2DModel", {}),
    "Flux": DIFFUSERS["flux"],
    "Flux 2": ("Flux2Transformer2DModel", {}),
    "Flux 3": ("Flux3Transformer2DModel", {}),
    "FramePack": ("HunyuanVideoFramepackTransformer3DModel", {}),
    "GLM-Image": ("GlmImageTransformer2DModel", {}),
    "Helios": ("HeliosTransformer3DModel", {}),
    "HiDream": DIFFUSERS["hidream"],
    "HunyuanDiT": ("HunyuanDiT2DModel", {"in_channels": 4, "patch_size": 2}),
    "HunyuanImage": DIFFUSERS["hunyuan-image"],
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {}),
    "HunyuanVideo 1.5": ("HunyuanVideo15Transformer3DModel", {}),
    "I2VGen-XL": ("I2VGenXLUNet", {}),
    "Ideogram 4": ("Ideogram4Transformer2DModel", {}),
    "JoyImage Edit": ("JoyImageEditTransformer3DModel", {}),
    "JoyImage Edit Plus": ("JoyImageEditPlusTransformer3DModel", {}),
    "Kandinsky 2 prior": ("PriorTransformer", {}),
    "Kandinsky 3": ("Kandinsky3UNet", {"layers_per_block": 1}),
    "Kandinsky 5": ("Kandinsky5Transformer3DModel", {"num_visual_blocks": 2}),
    "Kandinsky 6": ("Kandinsky6Transformer3DModel", {"num_visual_blocks": 2, "num_text_blocks": 1}),
    "Kandinsky 6 SR": ("Kandinsky6SRTransformer3DModel", {"num_visual_blocks": 2}),
    "Krea 2": ("Krea2Transformer2DModel", {}),
    "Latte": (
        "LatteTransformer3DModel",
        {"in_channels": 4, "patch_size": 2, "cross_attention_dim": 1408, "caption_channels": 24},
    ),
    "LongCat Audio": ("LongCatAudioDiTTransformer", {"dit_depth": 2}),
    "LongCat Image": ("LongCatImageTransformer2DModel", {}),
    "LTX": ("LTXVideoTransformer3DModel", {}),
    "LTX 2": ("LTX2VideoTransformer3DModel", {}),
    "Lumina Next": ("LuminaNextDiT2DModel", {"num_kv_heads": 8}),
    "Lumina 2": ("Lumina2Transformer2DModel", {}),
    "MiniMax H3": ("MiniMaxH3Transformer3DModel", {}),
    "MiniMax Music 3": ("MiniMaxMusic3Transformer1DModel", {}),
    "Mochi": DIFFUSERS["mochi"],
    "Motif Video": ("MotifVideoTransformer3DModel", {}),
    "Nucleus MoE": ("NucleusMoEImageTransformer2DModel", {}),
    "OmniGen": ("OmniGenTransformer2DModel", {"rope_scaling": {"long_factor": [1] * 48, "short_factor": [1] * 48}}),
    "Ovis Image": ("OvisImageTransformer2DModel", {}),
    "PixArt": ("PixArtTransformer2DModel", {}),
    "PRX": ("PRXTransformer2DModel", {}),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
    "Qwen-Image 2.1": ("QwenImage21Transformer2DModel", {}),
    "RFD4 Proteina": ("RFD4ProteinaTransformer", {"nlayers": 4}),
    "Sana": ("SanaTransformer2DModel", {}),
    "Sana Video": ("SanaVideoTransformer3DModel", {}),
    "Sana WM": ("SanaWMTransformer3DModel", {}),
    "Sana WM refiner": ("SanaWMLTX2RefinerTransformer3DModel", {}),
    "SkyReels 2": ("SkyReelsV2Transformer3DModel", {}),
    "Stable Audio": ("StableAudioDiTModel", {}),
    "Stable Audio 3": ("StableAudio3DiTModel", {}),
    "Stable Cascade, Würstchen": (
        "StableCascadeUNet",
        {"down_num_layers_per_block": (1, 2), "up_num_layers_per_block": (2, 1)},
    ),
    "Stable Video Diffusion": ("UNetSpatioTemporalConditionModel", {}),
    "AnimateDiff": ("UNetMotionModel", {}),
    "UNet 1D": ("UNet1DModel", {}),
    "UNet 2D": ("UNet2DModel", {}),
    "UNet 3D": ("UNet3DConditionModel", {}),
    "UViT (aMUSEd)": ("UVit2DModel", {"num_hidden_layers": 2}),
    "Wan 2.1": ("WanTransformer3DModel", {"image_dim": 24, "added_kv_proj_dim": 5120}),
    "Wan 2.2": ("WanTransformer3DModel", {}),
    "Wan VACE": DIFFUSERS["wan vace"],
    "Wan Animate": ("WanAnimateTransformer3DModel", {}),
    "Wan Animate 2": ("WanAnimate2Transformer3DModel", {}),
    "Z-Image": ("ZImageTransformer2DModel", {}),
}
EXCEPTIONS = {
    "DreamLiteTransformer2DModel": "a part of DreamLiteUNetModel",
    "MiniMaxMusic3RVQDepthDecoder": "a decoder of tokens, no denoiser",
    "MotionAdapter": "the motion modules of UNetMotionModel alone",
    "T5FilmDecoder": "a decoder of notes, deprecated in diffusers",
    "Transformer2DModel": "a part of UNet2DConditionModel",
    "TransformerTemporalModel": "a part of UNet3DConditionModel",
}
_MOE = {**MODERN, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "depth": 2, "out_hidden_size": 32}
LANGUAGE: dict[str, tuple[str, str, Settings]] = {
    "CLIP text": TRANSFORMERS["clip"],
    "CLIP text, with projection": TRANSFORMERS["clip with projection"],
    "CLIP vision": TRANSFORMERS["clip image"],
    "T5": TRANSFORMERS["t5"],
    "T5, both halves": ("T5ForConditionalGeneration", "T5Config", {**T5, "num_decoder_layers": 2}),
    "UMT5": TRANSFORMERS["umt5"],
    "ALBERT": ("AlbertModel", "AlbertConfig", TEXT),
    "BART": ("BartModel", "BartConfig", {"encoder_layers": 2, "decoder_layers": 2, "vocab_size": 90}),
    "BERT": TRANSFORMERS["bert"],
    "BLOOM": ("BloomForCausalLM", "BloomConfig", {"n_layer": 2, "vocab_size": 90}),
    "Cohere": ("CohereForCausalLM", "CohereConfig", {**MODERN}),
    "DeBERTa 2": ("DebertaV2Model", "DebertaV2Config", TEXT),
    "DeepSeek 3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **TEXT,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
        },
    ),
    "DINO 2": TRANSFORMERS["dinov2"],
    "DistilBERT": ("DistilBertModel", "DistilBertConfig", {"n_layers": 2, "vocab_size": 90}),
    "Falcon": ("FalconForCausalLM", "FalconConfig", TEXT),
    "Gemma": TRANSFORMERS["gemma"],
    "Gemma 2": TRANSFORMERS["gemma2"],
    "Gemma 3": TRANSFORMERS["gemma3"],
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 90}),
    "GPT-J": ("GPTJForCausalLM", "GPTJConfig", {"n_layer": 2, "n_embd": 32, "n_head": 4, "rotary_dim": 4}),
    "GPT-NeoX": TRANSFORMERS["gpt-neox"],
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {**MODERN, "num_local_experts": 4}),
    "Llama": TRANSFORMERS["llama with head"],
    "Llama 4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**MODERN, "num_local_experts": 4, "intermediate_size_mlp": 48},
    ),
    "Mistral": TRANSFORMERS["mistral"],
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**MODERN, "num_local_experts": 4}),
    "ModernBERT": ("ModernBertModel", "ModernBertConfig", {**TEXT, "pad_token_id": 0}),
    "MPT": ("MptForCausalLM", "MptConfig", {"n_layers": 2, "d_model": 32, "n_heads": 4, "vocab_size": 90}),
    "OPT": ("OPTForCausalLM", "OPTConfig", {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Phi": ("PhiForCausalLM", "PhiConfig", TEXT),
    "Phi 3": TRANSFORMERS["phi3"],
    "Qwen 2": TRANSFORMERS["qwen2"],
    "Qwen 2.5 VL": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {"text_config": MODERN, "vision_config": _VISION},
    ),
    "Qwen 3": TRANSFORMERS["qwen3"],
    "Qwen 3 MoE": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_MOE, "num_experts": 4}),
    "Qwen 3 Next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {**_MOE, "num_hidden_layers": 4, "num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "RWKV": ("RwkvForCausalLM", "RwkvConfig", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 90}),
    "SigLIP vision": TRANSFORMERS["siglip"],
    "Swin": ("SwinModel", "SwinConfig", {}),
    "ViT": ("ViTModel", "ViTConfig", TEXT | {"vocab_size": None}),
    "Whisper": (
        "WhisperModel",
        "WhisperConfig",
        {"encoder_layers": 2, "decoder_layers": 2, "vocab_size": 90, "pad_token_id": 0},
    ),
    "XLM-RoBERTa": TRANSFORMERS["xlm-roberta"],
    "XLNet": ("XLNetModel", "XLNetConfig", {"n_layer": 2, "d_model": 32, "n_head": 4, "d_inner": 48, "vocab_size": 90}),
    "ConvNeXt": ("ConvNextModel", "ConvNextConfig", {}),
    "Mamba": ("MambaForCausalLM", "MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 90}),
    "Mamba 2": ("Mamba2ForCausalLM", "Mamba2Config", {"num_hidden_layers": 2, "vocab_size": 90}),
    "ResNet": ("ResNetModel", "ResNetConfig", {}),
}


@cache
def denoiser(name: str) -> nn.Module:
    return make("diffusers", *DENOISERS[name])


@cache
def language(name: str) -> nn.Module:
    kind, config, settings = LANGUAGE[name]
    return make("transformers", kind, dict(settings), config)
