"""A model without its class has the layers of the real one, and presets choose the same of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

import pytest
import torch
from torch import Tensor, nn

import nerine
from nerine import LoRA, TargetError
from nerine.files.names import aliases
from nerine.model.mount import Spot
from nerine.model.presets import PRESETS, select
from nerine.model.skeleton import is_packed, skeleton
from nerine.model.structure import Structure
from nerine.model.targets import every_spot
from target_models import DENOISERS, LANGUAGE, denoiser, language

# What names and shapes do not tell. A parameter that a module of its own class calls `weight` looks like the layer's.
PARAMETERS = {
    "MiniMax Music 3": ("time_proj",),
    "Sana WM": ("blocks.*.attn.conv_k", "blocks.*.attn.conv_k_cam"),
    "Wan Animate": ("motion_encoder.*",),
    "gpt-oss": ("model.layers.*.mlp.router",),
}
# Tables that other libraries keep as buffers are parameters here, and a lone vector is a norm. Only a pattern that
# names them, or train_norm, could choose them.
BESIDES = ("*pos_embed.pos_embed", "*pos_embed.pe", "patch_embedding.pos_embed", "time_proj")
# Embeddings under names of their own.
EMBEDDINGS = {"RFD4 Proteina": ("init_repr_factory.feature_modules.*", "cond_factory.feature_modules.cath_code.*")}
# RFD4's feed-forward has its two layers in modules of their own, whose order a file does not keep.
UNORDERED = {"RFD4 Proteina"}
QUICK = {
    *("Stable Diffusion 1", "SDXL", "SD3", "Flux", "Wan 2.2", "Sana", "HiDream", "Kandinsky 3", "Qwen-Image"),
    *("CLIP text", "CLIP text, with projection", "T5", "GPT-2", "GPT-NeoX", "Mixtral", "Phi 3", "SigLIP vision"),
}


def built(name: str) -> nn.Module:
    return denoiser(name) if name in DENOISERS else language(name)


def of(model: nn.Module) -> nn.Module:
    """The skeleton of a model, from its tensors in the order in which a file has them."""
    return skeleton({name: (tuple(t.shape), t.dtype) for name, t in sorted(model.state_dict().items())})


def made(**tensors: tuple[int, ...]) -> nn.Module:
    """The skeleton of tensors of these shapes; two underscores stand for a dot."""
    return skeleton({name.replace("__", "."): (shape, torch.float16) for name, shape in tensors.items()})


def chosen(model: nn.Module, preset: str) -> set[str]:
    try:
        return set(select(model, preset))
    except TargetError:
        return set()


def is_one(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path.removesuffix(".weight"), pattern) for pattern in patterns)


def every(names: Mapping[str, object]) -> list[object]:
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", every({**DENOISERS, **LANGUAGE}))
def test_it_has_the_layers_of_the_real_model(name: str) -> None:
    real = built(name)
    known = PARAMETERS.get(name, ()) + EMBEDDINGS.get(name, ())
    want = {path: spot.site for path, spot in every_spot(real).items() if not is_one(path, known)}
    found = {path: spot.site for path, spot in every_spot(of(real)).items() if not is_one(path, known)}
    assert [path for path in want if path not in found] == []
    assert [path for path in found if path not in want and not is_one(path, BESIDES)] == []
    for path, site in want.items():
        own = found[path]
        assert (own.kind, own.shape, own.has_bias, own.flipped, own.experts) == (
            site.kind,
            site.shape,
            site.has_bias,
            site.flipped,
            site.experts,
        ), path
        assert own.groups == 1  # which no weight tells


@pytest.mark.parametrize("name", every({**DENOISERS, **LANGUAGE}))
def test_presets_choose_the_same_layers(name: str) -> None:
    real = built(name)
    fake, known = of(real), PARAMETERS.get(name, ()) + EMBEDDINGS.get(name, ())
    for preset in PRESETS:
        if preset == "ia3" and name in UNORDERED:
            continue
        want, found = chosen(real, preset), chosen(fake, preset)
        assert {p for p in want ^ found if not is_one(p, known)} == set(), preset
        assert found or not want


@pytest.mark.parametrize("name", ["Stable Diffusion 1", "Flux", "CLIP text", "GPT-2"])
def test_a_plan_on_it_is_that_of_the_real_model(name: str) -> None:
    real = built(name)
    want = nerine.plan(real, LoRA(rank=4), targets="attn-mlp")
    once = skeleton({name: (tuple(p.shape), p.dtype) for name, p in sorted(real.named_parameters())})  # tied ones too
    found = nerine.plan(once, LoRA(rank=4), targets="attn-mlp")
    keys = ("layer", "kind", "shape", "algorithm", "tensors", "params")
    assert {tuple(map(str, (getattr(r, k) for k in keys))) for r in found.rows} == {
        tuple(map(str, (getattr(r, k) for k in keys))) for r in want.rows
    }
    assert found.base_params == want.base_params


# -- names of other programs -------------------------------------------------------------------------------------------
def native(name: str, naming: str) -> tuple[nn.Module, dict[str, str], dict[str, Spot]]:
    """The skeleton of a model of diffusers under another program's names, {name there: path here}, and what is here."""
    real = every_spot(built(name))
    found = aliases({path: spot.site.shape for path, spot in real.items()})[naming]
    tensors = {}
    for alias in found:
        out, *rest = real[alias.own].site.shape
        tensors[f"{alias.name}.weight"] = ((alias.rows[1] if alias.rows else out, *rest), torch.float16)
        if real[alias.own].site.has_bias:
            tensors[f"{alias.name}.bias"] = ((alias.rows[1] if alias.rows else out,), torch.float16)
    return skeleton(tensors), {alias.name: alias.own for alias in found}, real


@pytest.mark.parametrize("name", ["Stable Diffusion 1", "Stable Diffusion 2", "SDXL"])
def test_unets_under_their_first_names_have_the_same_blocks(name: str) -> None:
    model, own, real = native(name, "native")
    found = every_spot(model)
    assert {own[path]: spot.site.shape for path, spot in found.items()} == {p: s.site.shape for p, s in real.items()}
    for preset in ("attn-only", "attn-mlp", "ia3", "unet-transformer-only"):
        assert {own[path] for path in chosen(model, preset)} == chosen(built(name), preset), preset
    outside = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}  # no blocks either way
    assert {own[path] for path in chosen(model, "full")} == chosen(built(name), "full") - outside


def test_open_clip_is_attention_of_torch_with_rows() -> None:
    model = skeleton(
        {
            name: (shape, torch.float16)
            for name, shape in {
                "positional_embedding": (77, 16),
                "text_projection": (16, 12),
                "token_embedding.weight": (90, 16),
                "logit_scale": (),
                "transformer.resblocks.0.attn.in_proj_weight": (48, 16),
                "transformer.resblocks.0.attn.in_proj_bias": (48,),
                "transformer.resblocks.0.attn.out_proj.weight": (16, 16),
                "transformer.resblocks.0.attn.out_proj.bias": (16,),
                "transformer.resblocks.0.ln_1.weight": (16,),
                "transformer.resblocks.0.ln_1.bias": (16,),
                "transformer.resblocks.0.mlp.c_fc.weight": (64, 16),
                "transformer.resblocks.0.mlp.c_fc.bias": (64,),
                "transformer.resblocks.0.mlp.c_proj.weight": (16, 64),
                "transformer.resblocks.0.mlp.c_proj.bias": (16,),
            }.items()
        }
    )
    lead = "transformer.resblocks.0"
    found = every_spot(model, [(0, 16)])
    assert found[f"{lead}.attn.in_proj_weight"].site.shape == (48, 16)
    assert found[f"{lead}.attn.in_proj_weight[0:16]"].site.shape == (16, 16)
    assert found[f"{lead}.attn.in_proj_weight[0:16]"].rows == (0, 16)
    assert found[f"{lead}.attn.out_proj"].site.has_bias
    assert (found["token_embedding"].site.kind, found["token_embedding"].site.shape) == ("embedding", (16, 90))
    assert found["text_projection"].site.shape == (16, 12)  # a parameter alone: it stands as it is
    assert found[f"{lead}.mlp.c_fc"].site.shape == (64, 16)  # a Linear, although GPT-2 has one of that name turned
    assert not found[f"{lead}.mlp.c_fc"].site.flipped
    assert chosen(model, "attn-only") == {f"{lead}.attn.in_proj_weight", f"{lead}.attn.out_proj"}
    assert chosen(model, "ia3") == {f"{lead}.attn.in_proj_weight", f"{lead}.mlp.c_proj"}


# -- one layer at a time -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("layer", "path"),
    [
        (nn.Linear(6, 4), "a.b"),
        (nn.Linear(6, 4, bias=False), "a.b"),
        (nn.Conv1d(6, 4, 3), "a.b"),
        (nn.Conv2d(6, 4, (3, 1), bias=False), "a.b"),
        (nn.Conv3d(6, 4, 1), "a.b"),
        (nn.ConvTranspose2d(6, 4, 3), "a.b"),  # the bias tells which of the two it is
        (nn.ConvTranspose2d(6, 6, 2), "up_blocks.0.upsample.conv"),  # and here the name does
        (nn.ConvTranspose1d(6, 4, 4, bias=False), "decoder.up_sampler"),
        (nn.Conv2d(6, 6, 2), "down_blocks.0.downsample"),
        (nn.Conv2d(6, 6, 3), "up_blocks.0.upsamplers.0.conv"),
        (nn.Embedding(30, 6), "model.embed_tokens"),
        (nn.Embedding(30, 6), "shared"),
        (nn.Linear(6, 30, bias=False), "gpt_neox.embed_out"),
        (nn.Linear(6, 30), "time_embedding"),
        (nn.LayerNorm(6), "a.norm"),
        (nn.GroupNorm(2, 6), "a.norm"),
        (nn.RMSNorm(6), "a.norm"),
        (nn.LayerNorm((3, 6)), "a.norm"),
        (nn.LayerNorm(6, bias=False), "a.norm"),
        (nn.BatchNorm2d(6), "a.bn"),
        (nn.MultiheadAttention(6, 2), "a.attn"),
        (nn.MultiheadAttention(6, 2, bias=False), "a.attn"),
        (nn.MultiheadAttention(6, 2, kdim=4, vdim=4), "a.attn"),
    ],
)
def test_every_kind_of_layer(layer: nn.Module, path: str) -> None:
    model = nn.Module()
    parent = model
    *above, last = path.split(".")
    for name in above:
        parent.add_module(name, nn.Module())
        parent = getattr(parent, name)
    parent.add_module(last, layer)
    real, found = every_spot(model), every_spot(of(model))
    assert set(found) == set(real)
    for own in real:
        want, got = real[own].site, found[own].site
        same = ("kind", "shape", "flipped", "opaque", "groups") + (() if "attn" in path else ("has_bias",))
        assert all(getattr(got, key) == getattr(want, key) for key in same), (got, want)


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm(6, elementwise_affine=False),
        nn.BatchNorm1d(6, affine=False),
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)),
    ],
)
def test_layers_without_a_weight_of_their_own_are_none(layer: nn.Module) -> None:
    model = nn.ModuleDict({"a": layer})
    found = every_spot(of(model))
    assert "a" not in found
    assert not any(spot.site.kind in ("norm", "conv") for spot in found.values())


def test_vectors_under_other_names_are_no_norms() -> None:
    """Flux calls the weight of an RMSNorm `scale`, Wan's VAE `gamma`: no layer here, and none on the real model."""
    model = made(query_norm__scale=(6,), block__norm__gamma=(6, 1, 1, 1), ls1__gamma=(6,))
    assert every_spot(model) == {}


def test_parameters_beside_layers() -> None:
    model = made(
        blocks__0__scale_shift_table=(6, 8),
        blocks__0__modulation=(1, 6, 8),
        blocks__0__proj__weight=(4, 8),
        experts__down_proj=(3, 8, 5),
        position=(1, 2, 3, 4),
    )
    found = {path: (spot.site.shape, spot.site.experts) for path, spot in every_spot(model).items()}
    assert found == {
        "blocks.0.scale_shift_table": ((6, 8), 0),
        "blocks.0.modulation": ((6, 8), 1),
        "blocks.0.proj": ((4, 8), 0),
        "experts.down_proj": ((8, 5), 3),
    }
    assert set(select(model, "all")) == {"blocks.0.proj"}


def test_a_layer_with_parts_is_none_in_whatever_order_they_come() -> None:
    for name in ("x.a.weight", "x.z.weight"):
        model = skeleton({"x.weight": ((4, 6), torch.float32), name: ((3, 5), torch.float32)})
        assert set(every_spot(model)) == {"x.weight", name.removesuffix(".weight")}


def test_what_is_packed_is_left_out_with_all_that_is_beside_it() -> None:
    """bitsandbytes in four bits (absmax, maps and a state beside packed bytes), in eight bits, and what is whole."""
    formats = {
        "a.weight": ((384, 1), torch.uint8),
        "a.weight.absmax": ((12,), torch.float32),
        "a.weight.nested_absmax": ((3, 2), torch.float32),
        "a.weight.quant_map": ((16,), torch.float32),
        "a.weight.quant_state.bitsandbytes__nf4": ((81,), torch.uint8),
        "a.bias": ((24,), torch.bfloat16),
        "b.weight": ((8, 6), torch.int8),
        "b.SCB": ((8,), torch.float32),
        "c.weight": ((8, 6), torch.bfloat16),
        "nv.weight": ((8, 3), torch.uint8),
        "nv.weight_scale": ((8, 2), torch.float8_e4m3fn),
        "nv.weight_scale_2": ((), torch.float32),
        "position_ids": ((1, 77), torch.int64),
        "norm.weight": ((6,), torch.float32),
        "norm.num_batches_tracked": ((), torch.int64),
        "relative_position_index": ((9, 9), torch.int64),
    }
    assert set(every_spot(skeleton(formats))) == {"c", "norm"}
    assert {n for n, (_, dtype) in formats.items() if is_packed(n, dtype)} == {"a.weight", "b.weight", "nv.weight"}


def test_eight_bits_are_layers_with_and_without_scales() -> None:
    eight = torch.float8_e4m3fn
    model = skeleton(
        {
            "plain.weight": ((8, 6), eight),
            "comfy.weight": ((8, 6), eight),
            "comfy.scale_weight": ((), torch.float32),
            "comfy.scale_input": ((), torch.float32),
            "blocks.weight": ((8, 6), torch.float8_e5m2),
            "blocks.weight_scale_inv": ((4, 3), torch.float32),
            "blocks.bias": ((8,), torch.bfloat16),
            "scaled_fp8": ((0,), eight),
        }
    )
    assert set(every_spot(model)) == {"plain", "comfy", "blocks"}
    assert every_spot(model)["blocks"].site.has_bias


def test_tied_weights_are_two_layers() -> None:
    """A file that has both names has both layers; one that leaves the head out, as transformers does, has one."""
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(9, 4), "lm_head": nn.Linear(4, 9, bias=False)})
    model["lm_head"].weight = model["embed_tokens"].weight
    assert set(every_spot(of(model))) == {"embed_tokens", "lm_head"}
    assert set(every_spot(made(embed_tokens__weight=(9, 4)))) == {"embed_tokens"}


@pytest.mark.parametrize(("turned", "shape"), [(True, (8, 24)), (False, (24, 8))])
def test_gpts_of_either_kind(turned: bool, shape: tuple[int, int]) -> None:
    """GPT-2 keeps its weights as [in, out]; programs that call the same layers so and do not are told by qkv."""
    lead = "h__0__attn__"
    model = made(
        **{
            "wte__weight": (50, 8),
            f"{lead}c_attn__weight": shape,
            f"{lead}c_attn__bias": (24,),
            f"{lead}c_proj__weight": (8, 8),
            f"{lead}c_proj__bias": (8,),
        }
    )
    found = every_spot(model)
    assert found["h.0.attn.c_attn"].site.shape == (24, 8)
    assert found["h.0.attn.c_attn"].site.flipped is turned
    assert found["h.0.attn.c_proj"].site.flipped is turned
    assert found["wte"].site.kind == "embedding"


# -- the tree ----------------------------------------------------------------------------------------------------------
def test_blocks_stand_in_the_order_of_their_numbers() -> None:
    names = [f"blocks.{i}.attn.to_q.weight" for i in (10, 2, 0, 9)] + ["a.10.weight", "a.9.weight"]
    model = skeleton(dict.fromkeys(sorted(names), ((4, 6), torch.float32)))
    numbers = [int(re.findall(r"\d+", path)[0]) for path in every_spot(model)]
    assert numbers == [9, 10, 0, 2, 9, 10]


def test_numbers_with_gaps_are_a_list_still() -> None:
    model = made(ff__net__0__proj__weight=(16, 8), ff__net__2__weight=(8, 16))
    assert isinstance(model.ff.net, nn.ModuleList)
    assert set(every_spot(model)) == {"ff.net.0.proj", "ff.net.2"}


def test_parts_that_are_made_alike_are_of_one_class() -> None:
    """So that a block that stands alone, as the middle of a UNet, is known by the others that are like it."""
    block = {f"{part}__weight": (8, 8) for part in ("to_q", "to_k", "to_v", "to_out")}
    model = made(
        **{f"blocks__{i}__{name}": shape for i in range(2) for name, shape in block.items()},
        **{f"middle__{name}": shape for name, shape in block.items()},
        other__proj__weight=(8, 8),
    )
    assert type(model.middle) is type(model.blocks[0])
    assert type(model.middle) is not type(model.other)
    roles = Structure(model).roles
    assert "attention" in roles["middle.to_q"]
    assert not roles["other.proj"]


def test_parts_of_a_pipeline() -> None:
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "unet.conv_in.weight": ((8, 4, 3, 3), torch.float16),
        "text_encoder.layers.0.q.weight": ((8, 6), torch.float16),
        "vae.conv.weight": ((8, 4, 3, 3), torch.float16),
    }
    assert set(every_spot(skeleton(tensors))) == {"unet.conv_in", "text_encoder.layers.0.q", "vae.conv"}
    model = skeleton(tensors, {"unet", "text_encoder"})
    assert set(every_spot(model)) == {"unet.conv_in", "text_encoder.layers.0.q"}
    assert chosen(model, "unet-only") == {"unet.conv_in"}


def test_it_takes_no_memory() -> None:
    model = made(large__weight=(2**20, 2**20))
    found: Tensor = next(model.parameters())
    assert found.is_meta
    assert found.shape == (2**20, 2**20)
