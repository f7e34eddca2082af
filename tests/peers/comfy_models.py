"""ComfyUI from a checkout, with tiny models of its own classes: the layouts of seven families, and their text encoders.

`NERINE_COMFYUI=/path/to/ComfyUI` says where it is. `comfy.model_base`, which needs much that nothing here needs, is
replaced by a module whose classes are empty; a tiny model is of the class of its family, so that ComfyUI's tables of
names are those of that family.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

CHECKOUT = os.environ.get("NERINE_COMFYUI", "")
NODES = Path(__file__).parents[2] / "integrations" / "comfyui" / "__init__.py"
MARKS = [
    pytest.mark.peers,
    pytest.mark.no_device_guard,
    pytest.mark.skipif(not CHECKOUT, reason="needs a checkout of ComfyUI at $NERINE_COMFYUI"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class _Models(types.ModuleType):
    """Stands for comfy.model_base: every class that is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__dict__.setdefault(name, type(name, (nn.Module,), {}))


@contextmanager
def comfyui() -> Iterator[Any]:
    """The package `comfy`, and `folder_paths` and the nodes of nerine as attributes of it."""
    sys.path.insert(0, CHECKOUT)
    before = set(sys.modules)
    try:
        importlib.import_module("comfy.cli_args").args.cpu = True
        comfy: Any = importlib.import_module("comfy")
        sys.modules["comfy.model_base"] = comfy.model_base = _Models("comfy.model_base")
        for name in ("lora", "ops", "hooks", "model_patcher", "weight_adapter", "sd1_clip", "sdxl_clip"):
            importlib.import_module(f"comfy.{name}")
        for name in ("sd3_clip", "t5", "llama", "wan"):
            importlib.import_module(f"comfy.text_encoders.{name}")
        comfy.folder_paths = importlib.import_module("folder_paths")
        spec = importlib.util.spec_from_file_location("nerine_nodes", NODES)
        assert spec is not None
        assert spec.loader is not None
        comfy.nodes = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(comfy.nodes)
        yield comfy
    finally:
        sys.path.remove(CHECKOUT)
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("comfy", "folder_paths", "utils", "nerine_nodes"):
                del sys.modules[name]


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with numbers in it, which ComfyUI leaves to the file of a model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in [*module.parameters(), *module.buffers()]:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return module.requires_grad_(False)


_UNET: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "use_spatial_transformer": True,
    "legacy": False,
}
_SD1 = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 24,
    "num_heads": 4,
}
_SDXL = {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "transformer_depth_middle": 2,
    "context_dim": 24,
    "num_head_channels": 16,
    "use_linear_in_transformer": True,
    "adm_in_channels": 40,
    "num_classes": "sequential",
}
_FLUX = {
    "in_channels": 4,
    "out_channels": 4,
    "vec_in_dim": 12,
    "context_in_dim": 20,
    "hidden_size": 48,
    "mlp_ratio": 2.0,
    "num_heads": 4,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [4, 4, 4],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
}
_SD3 = {
    "input_size": 8,
    "in_channels": 4,
    "depth": 2,
    "num_blocks": 2,
    "adm_in_channels": 12,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 20, "out_features": 128}},
    "qk_norm": "rms",
    "num_patches": 16,
    "pos_embed_max_size": 4,
    "context_size": 20,
}
_WAN = {
    "in_dim": 4,
    "out_dim": 4,
    "dim": 48,
    "ffn_dim": 80,
    "freq_dim": 16,
    "text_dim": 20,
    "num_heads": 4,
    "num_layers": 2,
}
_QWEN = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "axes_dims_rope": (4, 6, 6),
}
_Z_IMAGE = {
    "dim": 48,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 4,
    "multiple_of": 16,
    "qk_norm": True,
    "cap_feat_dim": 20,
    "axes_dims": (4, 4, 4),
    "axes_lens": (8, 8, 8),
}
DENOISERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "SD1.5": ("BaseModel", "ldm.modules.diffusionmodules.openaimodel", "UNetModel", _UNET | _SD1),
    "SDXL": ("SDXL", "ldm.modules.diffusionmodules.openaimodel", "UNetModel", _UNET | _SDXL),
    "SD3": ("SD3", "ldm.modules.diffusionmodules.mmdit", "MMDiT", _SD3),
    "Flux": ("Flux", "ldm.flux.model", "Flux", _FLUX),
    "Wan": ("WAN21", "ldm.wan.model", "WanModel", _WAN),
    "Qwen-Image": ("QwenImage", "ldm.qwen_image.model", "QwenImageTransformer2DModel", _QWEN),
    "Z-Image": ("Lumina2", "ldm.lumina.model", "NextDiT", _Z_IMAGE),
}


def inner(comfy: Any, name: str, operations: str = "disable_weight_init") -> nn.Module:
    """The denoiser of a family."""
    _, where, kind, settings = DENOISERS[name]
    module = importlib.import_module(f"comfy.{where}")
    made = getattr(module, kind)(
        **settings, dtype=torch.float32, device=torch.device("cpu"), operations=getattr(comfy.ops, operations)
    )
    if name == "Z-Image":  # this checkout has its predecessor, whose blocks have one module more here
        for block in [*made.layers, *made.noise_refiner]:
            block.adaLN_modulation = nn.Sequential(block.adaLN_modulation[1])
    return filled(made)


def model_of(comfy: Any, name: str, operations: str = "disable_weight_init") -> Any:
    """A model of a family as ComfyUI has it."""
    family, _, _, settings = DENOISERS[name]

    class Model(getattr(comfy.model_base, family)):  # type: ignore[misc]
        model_config = types.SimpleNamespace(unet_config=settings)
        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.diffusion_model = inner(comfy, name, operations)

    return Model()


_CLIP = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 8, "vocab_size": 49408}
_T5: dict[str, Any] = {"d_ff": 40, "d_kv": 8, "d_model": 24, "num_heads": 2, "num_layers": 2, "vocab_size": 50}
_LLM = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
ENCODERS = {
    "SD1.5": ["clip_l"],
    "SDXL": ["clip_l", "clip_g"],
    "SD3": ["clip_l", "clip_g", "t5xxl"],
    "Flux": ["clip_l", "t5xxl"],
    "Wan": ["umt5xxl"],
    "Qwen-Image": ["qwen25_7b"],
    "Z-Image": ["qwen3_4b"],
}


def encoder(comfy: Any, name: str) -> nn.Module:
    """A text encoder, the module that bears the names of transformers."""
    device, dtype, ops = torch.device("cpu"), torch.float32, comfy.ops.manual_cast
    if name.startswith("clip"):
        width, act = (16, "gelu") if name == "clip_g" else (12, "quick_gelu")
        config = {**_CLIP, "hidden_size": width, "intermediate_size": 2 * width, "hidden_act": act, "eos_token_id": 3}
        return filled(comfy.clip_model.CLIPTextModel(config, dtype, device, ops))
    if "t5" in name:
        kind = "umt5" if name.startswith("u") else "t5"
        config = {**_T5, "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "model_type": kind}
        return filled(comfy.text_encoders.t5.T5(config, dtype, device, ops))

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            llama = comfy.text_encoders.llama
            self.model = llama.Llama2_(llama.Qwen25_3BConfig(**_LLM), device=device, dtype=dtype, ops=ops)

    return filled(Transformer())


def clip_of(comfy: Any, name: str) -> nn.Module:
    """The text encoders of a family as ComfyUI has them."""
    clip = nn.Module()
    for own in ENCODERS[name]:
        child = nn.Module()
        child.transformer = encoder(comfy, own)
        setattr(clip, own, child)
    clip.device = torch.device("cpu")
    return clip


class Clip:
    """What a CLIP is to a node."""

    def __init__(self, patcher: Any) -> None:
        self.patcher = patcher
        self.cond_stage_model = patcher.model

    def clone(self) -> Clip:
        return Clip(self.patcher.clone())


def patcher_of(comfy: Any, model: Any) -> Any:
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
