"""Small models of other libraries without any memory behind them: what their layers are called and how they are shaped.

`DIFFUSERS` and `TRANSFORMERS` say how to build them, by class name. They are made on the meta device, so that only the
number of layers costs time.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from functools import cache
from typing import Any

import torch
from torch import nn

Shape = tuple[int, ...]

SIZES = dict.fromkeys(
    ("num_layers", "num_single_layers", "n_layers", "num_mmdit_layers", "num_single_dit_layers", "depth"), 2
)
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": (32, 64, 64, 64),
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
    },
    "sd2": {
        "block_out_channels": (32, 64, 64, 64),
        "layers_per_block": 2,
        "attention_head_dim": (2, 4, 4, 4),
        "cross_attention_dim": 16,
        "use_linear_projection": True,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 24,
    },
    "sdxl": {
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (2, 4, 4),
        "cross_attention_dim": 16,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
    "two levels": {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
    },
    "no attention in the middle": {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
    },
}
DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"unet {name}": ("UNet2DConditionModel", settings) for name, settings in UNETS.items()},
    "controlnet": ("ControlNetModel", {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 16}),
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True, "num_attention_heads": 2, "attention_head_dim": 64}),
    "flux2": ("Flux2Transformer2DModel", {}),
    "chroma": ("ChromaTransformer2DModel", {}),
    "sd3": (
        "SD3Transformer2DModel",
        {"num_attention_heads": 2, "attention_head_dim": 64, "caption_projection_dim": 128},
    ),
    "sd3.5": (
        "SD3Transformer2DModel",
        {
            "num_layers": 3,
            "num_attention_heads": 3,
            "attention_head_dim": 64,
            "caption_projection_dim": 192,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0, 1),
        },
    ),
    "auraflow": ("AuraFlowTransformer2DModel", {}),
    "pixart": ("PixArtTransformer2DModel", {"use_additional_conditions": True, "caption_channels": 24}),
    "sana": ("SanaTransformer2DModel", {}),
    "lumina2": ("Lumina2Transformer2DModel", {}),
    "z-image": ("ZImageTransformer2DModel", {}),
    "qwen-image": ("QwenImageTransformer2DModel", {}),
    "hidream": (
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "caption_channels": [8, 8],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "llama_layers": [0, 1],
        },
    ),
    "hunyuan-image": ("HunyuanImageTransformer2DModel", {"guidance_embeds": True, "text_embed_2_dim": 24}),
    "hunyuan-video": ("HunyuanVideoTransformer3DModel", {}),
    "wan": ("WanTransformer3DModel", {}),
    "wan image": ("WanTransformer3DModel", {"image_dim": 24, "added_kv_proj_dim": 5120}),
    "wan vace": ("WanVACETransformer3DModel", {"vace_layers": [0, 1]}),
    "ltx": ("LTXVideoTransformer3DModel", {}),
    "ltx2": ("LTX2VideoTransformer3DModel", {}),
    "mochi": ("MochiTransformer3DModel", {"num_layers": 3}),
    "cosmos2": ("CosmosTransformer3DModel", {}),
}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 90}
MODERN = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CLIP = {**TEXT, "projection_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 90}
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "clip": ("CLIPTextModel", "CLIPTextConfig", CLIP),
    "clip with projection": ("CLIPTextModelWithProjection", "CLIPTextConfig", CLIP),
    "t5": ("T5EncoderModel", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}),
    "t5 plain": ("T5EncoderModel", "T5Config", T5),
    "umt5": ("UMT5EncoderModel", "UMT5Config", {**T5, "feed_forward_proj": "gated-gelu"}),
    "bert": ("BertModel", "BertConfig", TEXT),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaConfig", TEXT),
    "llama": ("LlamaModel", "LlamaConfig", MODERN),
    "llama with head": ("LlamaForCausalLM", "LlamaConfig", MODERN),
    "mistral": ("MistralForCausalLM", "MistralConfig", MODERN),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", MODERN),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", MODERN),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", MODERN),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", MODERN),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", MODERN),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", MODERN),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", TEXT),
    "clip image": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**TEXT, "projection_dim": 16}),
    "dinov2": ("Dinov2Model", "Dinov2Config", TEXT),
}
# Built as they come, with as few layers as can be said: for what their layers are called.
OTHERS = (
    "AllegroTransformer3DModel",
    "AutoencoderKL",
    "BriaTransformer2DModel",
    "CogVideoXTransformer3DModel",
    "CogView4Transformer2DModel",
    "Kandinsky5Transformer3DModel",
    "LongCatImageTransformer2DModel",
    "MotionAdapter",
    "OvisImageTransformer2DModel",
    "PriorTransformer",
    "SanaVideoTransformer3DModel",
    "SkyReelsV2Transformer3DModel",
    "StableAudioDiTModel",
    "StableCascadeUNet",
    "T2IAdapter",
)


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    """The weights' shapes by the layers' paths."""
    found = ((path, getattr(module, "weight", None)) for path, module in model.named_modules())
    return {path: tuple(weight.shape) for path, weight in found if weight is not None}


def make(library: str, name: str, settings: dict[str, Any], config: str = "") -> nn.Module:
    """The model itself, on the meta device."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # what other libraries say about themselves
        module = importlib.import_module(library)
        kind = getattr(module, name)
        if config:
            return kind(getattr(module, config)(**settings))
        known = inspect.signature(kind.__init__).parameters
        return kind(**{**{k: v for k, v in SIZES.items() if k in known}, **settings})


def build(library: str, name: str, settings: dict[str, Any], config: str = "") -> dict[str, Shape]:
    return shapes_of(make(library, name, settings, config))


@cache
def diffusers_shapes(name: str) -> dict[str, Shape]:
    kind, settings = DIFFUSERS.get(name, (name, {}))
    return build("diffusers", kind, settings)


@cache
def transformers_shapes(name: str) -> dict[str, Shape]:
    kind, config, settings = TRANSFORMERS[name]
    return build("transformers", kind, settings, config)
