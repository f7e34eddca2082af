"""Loading the tiny model from the package: offline and silent, under any version of the two libraries.

The parts are built from their configurations and filled here, instead of by `from_pretrained`: that one shows
progress bars that can only be silenced for the whole process. The folder is in the usual layout all the same,
so `TinyPipeline.from_pretrained(MODEL)` works too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from nerine.errors import MissingExtra

if TYPE_CHECKING:
    from nerine.tiny.pipeline import TinyPipeline

MODEL = Path(__file__).parent / "model"
TEXT_PREFIX = "text_model."  # in CLIP files; the module itself lost it with transformers 5


def load_pipeline(dtype: torch.dtype = torch.float32, folder: str | Path = MODEL) -> TinyPipeline:
    """The trained tiny model, in eval mode on the CPU, with its progress bar off.

    *Raises* MissingExtra without diffusers or transformers.
    """
    try:
        from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

        from nerine.tiny.pipeline import TinyPipeline
    except ImportError as error:
        raise MissingExtra(
            f'the tiny model needs diffusers and transformers ({error}): pip install "nerine[train]"'
        ) from error
    folder = Path(folder)
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
    text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    pipeline = TinyPipeline(
        _fill(unet, folder / "unet" / "diffusion_pytorch_model.safetensors", dtype),
        _fill(text_encoder, folder / "text_encoder" / "model.safetensors", dtype),
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _fill(module: Any, file: Path, dtype: torch.dtype) -> Any:
    """The module with the file's weights, in eval mode and that dtype."""
    own = module.state_dict()
    found = load_file(file)
    module.load_state_dict({key if key in own else key.removeprefix(TEXT_PREFIX): found[key] for key in found})
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return module.eval()
