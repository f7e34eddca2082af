"""The same layers through diffusers' own converters: a checkpoint in the original names, every row with a number of its
own, must arrive row by row where our tables say."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from meta_models import build
from nerine.files.names import aliases, renamed

pytest.importorskip("diffusers", reason="needs diffusers: pip install 'nerine[train]'")

pytestmark = [pytest.mark.peers, pytest.mark.no_device_guard]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers.loaders import single_file_utils

QK = ("norm.query_norm", "norm.key_norm")
SANA = ("pos_embed", "y_embedder.y_embedding", "final_layer.scale_shift_table")
# name: class, converter, its settings, what it calls `scale`, and bare parameters that it wants to see. Some converters
# know sizes by heart, so the widths are the real ones.
MODELS: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "flux": ("FluxTransformer2DModel", "flux_transformer_checkpoint", {"guidance_embeds": True}, QK, ()),
    "flux2": ("Flux2Transformer2DModel", "flux2_transformer_checkpoint", {}, QK, ()),
    "chroma": (
        "ChromaTransformer2DModel",
        "chroma_transformer_checkpoint",
        {},
        (*QK, "distilled_guidance_layer.norms"),
        (),
    ),
    "sd3": (
        "SD3Transformer2DModel",
        "sd3_transformer_checkpoint",
        {"num_layers": 3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
        (),
        ("pos_embed",),
    ),
    "auraflow": ("AuraFlowTransformer2DModel", "auraflow_transformer_checkpoint", {}, (), ("positional_encoding",)),
    "sana": (
        "SanaTransformer2DModel",
        "sana_transformer",
        {},
        (),
        (*SANA, "blocks.0.scale_shift_table", "blocks.1.scale_shift_table"),
    ),
    "lumina2": ("Lumina2Transformer2DModel", "lumina2", {}, (), ()),
    "z-image": ("ZImageTransformer2DModel", "z_image_transformer_checkpoint", {}, (), ()),
    "hunyuan-video": ("HunyuanVideoTransformer3DModel", "hunyuan_video_transformer", {}, (), ()),
    "wan": ("WanTransformer3DModel", "wan_transformer", {"image_dim": 24, "added_kv_proj_dim": 5120}, (), ()),
    "wan vace": ("WanVACETransformer3DModel", "wan_transformer", {"vace_layers": [0, 1]}, (), ()),
    "ltx": ("LTXVideoTransformer3DModel", "ltx_transformer_checkpoint", {}, (), ()),
    "ltx2": ("LTX2VideoTransformer3DModel", "ltx2_transformer", {}, (), ()),
    "mochi": ("MochiTransformer3DModel", "mochi_transformer_checkpoint", {"num_layers": 48}, (), ("pos_frequencies",)),
    "cosmos2": ("CosmosTransformer3DModel", "cosmos_transformer_checkpoint", {}, (), ()),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_row_arrives(name: str) -> None:
    kind, converter, settings, scales, bare = MODELS[name]
    shapes = build("diffusers", kind, settings)
    namings = aliases(shapes)
    found = namings.get("original", namings["native"])
    rows = {
        name: 1000 * number + torch.arange(shape[0], dtype=torch.float64) / shape[0]
        for number, (name, shape) in enumerate(renamed(shapes, found).items())
    }
    checkpoint = {f"{n}.{'scale' if any(s in n for s in scales) else 'weight'}": v[:, None] for n, v in rows.items()}
    checkpoint |= {f"{n}.bias": v for n, v in rows.items()} | {n: torch.zeros(1) for n in bare}
    arrived = getattr(single_file_utils, f"convert_{converter}_to_diffusers")(checkpoint)

    for alias in found:
        here = arrived[f"{alias.own}.weight"].flatten()
        assert here.shape[0] == shapes[alias.own][0], alias
        there = rows[alias.name]
        assert torch.equal(here[slice(*(alias.own_rows or (None,)))], there[slice(*(alias.rows or (None,)))]), alias
    weights = {key.removesuffix(".weight") for key in arrived if key.endswith(".weight")}
    assert weights == set(shapes)
