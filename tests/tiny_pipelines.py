"""Whole pipelines of diffusers, with random weights and a few thousand of them: SD, SDXL, SD 3 and Flux.

Their text encoders read words from a vocabulary of letters, made here; nothing is fetched. `run` gives the latents or
the image of one short run from fixed noise.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

LENGTH = 10  # tokens of a prompt
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = {word: i for i, word in enumerate(["<s>", "</s>", "<pad>", *LETTERS])}


def tokenizer() -> Any:
    """One token a letter."""
    rules = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
    rules.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=rules,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<pad>",
        model_max_length=LENGTH,
    )


def clip(width: int = 12, seed: int = 1, projected: bool = False) -> Any:
    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=20,
        num_attention_heads=2,
        num_hidden_layers=3,
        vocab_size=len(WORDS),
        max_position_embeddings=LENGTH,
        projection_dim=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config).eval()


def t5(width: int = 16) -> Any:
    torch.manual_seed(3)
    config = transformers.T5Config(
        d_model=width, d_kv=6, d_ff=20, num_heads=2, num_layers=2, vocab_size=len(WORDS), feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config).eval()


def unet(context: int = 12, **more: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=context,
        attention_head_dim=4,
        norm_num_groups=4,
        **more,
    ).eval()


def vae(channels: int = 4) -> Any:
    torch.manual_seed(4)
    return diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=channels, use_quant_conv=False
    ).eval()


def sd() -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        unet=unet(),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    own = unet(
        20,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(8, 2, projected=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=own,
        scheduler=diffusers.DDIMScheduler(),
    )


def sd3() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=6,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=12,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    ).eval()
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=clip(8, 1, projected=True),
        text_encoder_2=clip(8, 2, projected=True),
        text_encoder_3=t5(24),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        tokenizer_3=tokenizer(),
    )


def flux() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    return diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=t5(24),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
    )


PIPELINES = {"sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": flux}
ENCODERS = {"sd": 1, "sdxl": 2, "sd3": 3, "flux": 2}


@torch.no_grad()
def run(pipe: Any, output: str = "latent", steps: int = 2) -> Tensor:
    """One short run from fixed noise."""
    pipe.set_progress_bar_config(disable=True)
    name = type(pipe).__name__
    more: dict[str, Any] = {} if "Flux" in name else {"negative_prompt": "bad"}
    if "Flux" in name or "3" in name:
        more["max_sequence_length"] = LENGTH
    found = pipe(
        "a cat",
        height=8,
        width=8,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(7),
        output_type=output,
        **more,
    ).images
    return torch.as_tensor(found)
