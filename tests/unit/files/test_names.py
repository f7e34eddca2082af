"""Layer names of other programs: real classes at tiny sizes, real names from released files, and the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nerine.files.names import Alias, aliases, family_of, flatten, unflatten

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'nerine[train]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'nerine[train]'")

CLIP = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 50,
    "max_position_embeddings": 10,
    "projection_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
UNET = {
    "sample_size": 8,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}


def sd1() -> nn.Module:
    return diffusers.UNet2DConditionModel(**UNET, block_out_channels=(8, 8, 16, 16), layers_per_block=2)


def sdxl() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        **UNET,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        guidance_embeds=True,
        axes_dims_rope=(2, 1, 1),
    )


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=8,
        pooled_projection_dim=6,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=20,
        num_layers=2,
        image_dim=6,
        added_kv_proj_dim=24,
    )


def clip() -> nn.Module:
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP))


def clip_with_projection() -> nn.Module:
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**CLIP))


MODELS = {"sd1": sd1, "sdxl": sdxl, "flux": flux, "sd3": sd3, "wan": wan}
FAMILIES = {"sd1": "sd-unet", "sdxl": "sdxl-unet", "flux": "flux", "sd3": "sd3", "wan": "wan"}


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    weights = ((path, getattr(module, "weight", None)) for path, module in model.named_modules())
    return {path: tuple(w.shape) for path, w in weights if isinstance(w, torch.Tensor)}


def native_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The layers of the original implementation that are these layers, from the aliases."""
    found: dict[str, tuple[int, ...]] = {}
    for alias in aliases(shapes)["native"]:
        rows = shapes[alias.own][0] if alias.rows is None else alias.rows[1]
        found[alias.name] = (max(rows, found.get(alias.name, (0,))[0]), *shapes[alias.own][1:])
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_has_its_native_name_and_comes_back(name: str) -> None:
    shapes = shapes_of(MODELS[name]())
    assert family_of(shapes) == FAMILIES[name]
    native = native_of(shapes)
    same_there = {"wan": {"patch_embedding"}}.get(name, set())
    assert {alias.own for alias in aliases(shapes)["native"]} == set(shapes) - same_there
    assert family_of(native) == FAMILIES[name]
    back = aliases(native)["diffusers"]
    assert {alias.name for alias in back} == set(shapes) - same_there
    there = {(a.own, a.name, a.own_rows, a.rows) for a in aliases(shapes)["native"]}
    again = {(a.name, a.own, a.rows, a.own_rows) for a in back}
    assert there == again


Q, FF = ".transformer_blocks.0.attn1.to_q", ".transformer_blocks.0.ff.net.0.proj"
# Names as released files have them, one for each kind of layer.
REAL: dict[str, list[tuple[str, str]]] = {
    "sd1": [
        ("down_blocks.0.attentions.1" + Q, "input_blocks.2.1" + Q),
        ("down_blocks.2.downsamplers.0.conv", "input_blocks.9.0.op"),
        ("down_blocks.3.resnets.1.conv2", "input_blocks.11.0.out_layers.3"),
        ("mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
        ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
        ("up_blocks.1.attentions.2" + FF, "output_blocks.5.1" + FF),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("up_blocks.3.resnets.2.conv_shortcut", "output_blocks.11.0.skip_connection"),
        ("conv_out", "out.2"),
    ],
    "sdxl": [
        ("down_blocks.1.attentions.0" + Q, "input_blocks.4.1" + Q),
        ("down_blocks.2.attentions.1.proj_out", "input_blocks.8.1.proj_out"),
        ("up_blocks.0.attentions.2" + FF, "output_blocks.2.1" + FF),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("up_blocks.2.resnets.1.conv1", "output_blocks.7.0.in_layers.2"),
        ("add_embedding.linear_2", "label_emb.0.2"),
    ],
    "flux": [
        ("transformer_blocks.1.norm1_context.linear", "double_blocks.1.txt_mod.lin"),
        ("single_transformer_blocks.0.proj_out", "single_blocks.0.linear2"),
        ("x_embedder", "img_in"),
    ],
    "sd3": [("transformer_blocks.0.attn2.to_out.0", "joint_blocks.0.x_block.attn2.proj")],
    "wan": [("blocks.1.attn2.add_k_proj", "blocks.1.cross_attn.k_img"), ("blocks.0.ffn.net.2", "blocks.0.ffn.2")],
}


@pytest.mark.parametrize("name", REAL)
def test_names_of_released_files(name: str) -> None:
    found = {(a.own, a.name) for a in aliases(shapes_of(MODELS[name]()))["native"]}
    assert set(REAL[name]) <= found


def test_layers_that_are_one_there_and_several_here() -> None:
    found = aliases(shapes_of(flux()))["native"]
    linear1 = [alias for alias in found if alias.name == "single_blocks.1.linear1"]
    lead = "single_transformer_blocks.1."
    assert linear1 == [
        Alias("single_blocks.1.linear1", f"{lead}{name}", rows=rows)
        for name, rows in [
            ("proj_mlp", (24, 56)),
            ("attn.to_q", (0, 8)),
            ("attn.to_k", (8, 16)),
            ("attn.to_v", (16, 24)),
        ]
    ]
    last = [alias for alias in found if alias.own == "norm_out.linear"]
    assert last == [
        Alias("final_layer.adaLN_modulation.1", "norm_out.linear", own_rows=(0, 8), rows=(8, 16)),
        Alias("final_layer.adaLN_modulation.1", "norm_out.linear", own_rows=(8, 16), rows=(0, 8)),
    ]


def test_the_last_block_of_sd3_keeps_shift_and_scale_the_other_way_round() -> None:
    found = [a for a in aliases(shapes_of(sd3()))["native"] if a.name.endswith("context_block.adaLN_modulation.1")]
    assert [(a.name, a.own_rows, a.rows) for a in found] == [
        ("joint_blocks.0.context_block.adaLN_modulation.1", None, None),
        ("joint_blocks.1.context_block.adaLN_modulation.1", (0, 8), (8, 16)),
        ("joint_blocks.1.context_block.adaLN_modulation.1", (8, 16), (0, 8)),
    ]


@pytest.mark.parametrize("make", [clip, clip_with_projection])
def test_text_encoders_of_both_versions_of_transformers(make: Any) -> None:
    shapes = shapes_of(make())
    q = "encoder.layers.1.self_attn.q_proj"
    names = {alias.name for found in aliases(shapes).values() for alias in found} | set(shapes)
    assert {q, f"text_model.{q}"} <= names


def test_a_model_of_no_known_family_has_only_its_own_names() -> None:
    shapes = shapes_of(nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"proj_out": nn.Linear(2, 2)})))
    assert (family_of(shapes), aliases(shapes)) == ("", {})


def test_attention_alone_is_counted_as_in_the_released_models() -> None:
    """A file for the attention of SDXL does not show how many layers its blocks have."""
    whole = shapes_of(sdxl())
    some = {path: shape for path, shape in whole.items() if ".attentions." in path}
    found = {(a.own, a.name) for a in aliases(some)["native"]}
    assert found == {(a.own, a.name) for a in aliases(whole)["native"] if ".attentions." in a.own}


@pytest.mark.parametrize("make", [*MODELS.values(), clip, clip_with_projection])
def test_paths_come_back_from_one_word(make: Any) -> None:
    shapes = shapes_of(make())
    both = [*shapes, *(alias.name for found in aliases(shapes).values() for alias in found)]
    assert [path for path in both if unflatten(flatten(path)) != path] == []


@pytest.mark.parametrize("name", ["down_blocks_0_florps", "", "_", "to__q", "3x"])
def test_words_that_are_not_known(name: str) -> None:
    assert unflatten(name) is None
