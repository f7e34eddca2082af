"""SD 1 at a size that a CPU trains in a moment: sd-scripts' own classes with their constants patched, and a tokenizer
of its own that needs no download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

CHANNELS = (32, 64, 64, 64)
WIDTH = 24  # of the text encoder


def patch(original_unet: Any) -> None:
    """Make the module that defines sd-scripts' UNet define a small one."""
    original_unet.BLOCK_OUT_CHANNELS = CHANNELS
    original_unet.TIMESTEP_INPUT_DIM = CHANNELS[0]
    original_unet.TIME_EMBED_DIM = CHANNELS[0] * 4
    original_unet.NORM_GROUPS = original_unet.TRANSFORMER_NORM_NUM_GROUPS = 8


def tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer of single letters."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def models(unet_class: Any, vocabulary: int) -> tuple[Any, Any, Any]:
    """(text encoder, VAE, UNet), the same at every call."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    unet = unet_class(64, 4, WIDTH, False)
    return CLIPTextModel(config), vae, unet


def pictures(folder: Path) -> Path:
    """A folder of two pictures with captions, as sd-scripts wants it."""
    own = folder / "1_style"
    own.mkdir(parents=True)
    for i in range(2):
        noise = torch.randint(0, 255, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        Image.fromarray(noise.numpy()).save(own / f"{i}.png")
        (own / f"{i}.txt").write_text("a picture in the style")
    return folder
