"""The base of an adapter, read from files: the layers and numbers of the live model, and adapters beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nerine
from nerine import BOFT, DoRA, FormatError, Full, LoKr, LoRA, TLoRA, UnsupportedBase
from nerine.files.store import Source, write_file
from nerine.model.mount import bias_at, weight_at
from nerine.model.presets import select
from nerine.model.targets import every_spot
from nerine.ops.precision import wide
from nerine.tools.weights import Weights, open_weights, read_adapter

FORMATS = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.to_qkv = nn.Linear(8, 24)
        self.conv = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.up = nn.ConvTranspose2d(6, 4, 2)
        self.table = nn.Parameter(torch.zeros(5, 7))
        self.experts = nn.Parameter(torch.zeros(3, 6, 4))


class Model(nn.Module):
    """A layer of every kind, and parameters that no layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.attn = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 5, bias=False)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def saved(file: Path, tensors: Mapping[str, Tensor]) -> Path:
    write_file(file, {name: t.detach().contiguous() for name, t in tensors.items()}, {})
    return file


# -- layers and numbers ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_every_layer_has_the_weight_of_the_live_model(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    path = saved(tmp_path / "m.safetensors", {name: t.to(dtype) for name, t in model.state_dict().items()})
    spots = every_spot(model)
    with open_weights(path) as base:
        assert set(base.sites) == set(spots)
        for own, spot in spots.items():
            want, found = weight_at(spot.holder, spot), base.weight(own)
            assert found.dtype == dtype, own
            assert torch.equal(found.to(torch.float32), want), own
            assert tuple(found.shape)[-len(spot.site.shape) :] == spot.site.shape
            bias, other = bias_at(spot.holder, spot), base.bias(own)
            assert (other is None) == (bias is None), own
            assert bias is None or torch.equal(other.to(torch.float32), bias)  # type: ignore[union-attr]
            both = base.base(own)
            assert both.weight().dtype == torch.float32
            assert torch.equal(both.weight(), want)


def test_the_names_that_they_have_in_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors", Model().state_dict())
    with open_weights(path) as base:
        assert base.key("blocks.1.to_qkv") == base.key("blocks.1.to_qkv[8:16]") == "blocks.1.to_qkv.weight"
        assert (base.key("attn.in_proj_weight"), base.key("attn.out_proj")) == (
            "attn.in_proj_weight",
            "attn.out_proj.weight",
        )
        assert (base.bias_key("attn.in_proj_weight"), base.bias_key("head")) == ("attn.in_proj_bias", None)
        assert base.key("blocks.0.table") == "blocks.0.table"
        assert base.bias_key("blocks.0.table") is None


def test_rows_of_a_fused_layer(tmp_path: Path) -> None:
    model = Model()
    path = saved(tmp_path / "m.safetensors", model.state_dict())
    with open_weights(path) as base:
        layer = model.blocks[0].to_qkv  # type: ignore[union-attr]
        assert torch.equal(base.weight("blocks.0.to_qkv[8:16]"), layer.weight[8:16])  # type: ignore[index]
        assert torch.equal(base.bias("blocks.0.to_qkv[8:16]"), layer.bias[8:16])  # type: ignore[arg-type,index]
        assert torch.equal(base.weight("attn.in_proj_weight[0:8]"), model.attn.in_proj_weight[0:8])
        assert base.spot("blocks.0.to_qkv[8:16]").site.shape == (8, 8)


def test_parts_of_a_layer_whose_parts_are_called_weight(tmp_path: Path) -> None:
    """A Linear may be called `weight` itself."""
    path = saved(tmp_path / "m.safetensors", {"weight.weight": torch.ones(3, 2), "gate.weight": torch.ones(4, 2)})
    with open_weights(path) as base:
        assert base.key("weight") == "weight.weight"
        assert base.weight("weight").shape == (3, 2)


def test_a_layer_at_the_top(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    with open_weights(saved(tmp_path / "m.safetensors", layer.state_dict())) as base:
        assert torch.equal(base.weight(""), layer.weight)
        assert torch.equal(base.bias(""), layer.bias)  # type: ignore[arg-type]


# -- eight bits and four -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("scale_weight", torch.tensor(0.25)),
        ("weight_scale", torch.linspace(0.5, 2, 8)),
        ("weight_scale", torch.tensor([0.5])),
        ("weight_scale_inv", torch.tensor([[0.5, 1.0, 2.0], [3.0, 4.0, 5.0]])),
    ],
)
def test_scaled_eight_bits_are_read_with_their_scale(tmp_path: Path, name: str, scale: Tensor) -> None:
    stored = torch.arange(48.0).reshape(8, 6).to(torch.float8_e4m3fn)
    tensors = {"a.q.weight": stored, f"a.q.{name}": scale, "a.q.bias": torch.ones(8), "a.k.weight": stored}
    path = saved(tmp_path / "m.safetensors", {**tensors, "a.q.input_scale": torch.tensor(3.0)})
    times = scale.reshape(-1, 1) if scale.dim() == 1 else scale
    if scale.dim() == 2:
        times = scale.repeat_interleave(4, 0).repeat_interleave(2, 1)
    with open_weights(path) as base:
        assert set(base.sites) == {"a.q", "a.k"}
        assert base.packed == {}
        assert torch.equal(base.weight("a.q"), stored.to(torch.float32) * times)
        assert torch.equal(base.weight("a.q[2:4]"), (stored.to(torch.float32) * times)[2:4])
        assert base.weight("a.k").dtype == torch.float8_e4m3fn
        assert base.key("a.k") == "a.k.weight"
        with pytest.raises(UnsupportedBase, match=rf"a\.q: .*a scale in a\.q\.{name}, and nothing is written over"):
            base.key("a.q")


def test_what_is_packed_is_told(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.zeros(24, 1, dtype=torch.uint8),
        "a.weight.absmax": torch.ones(3),
        "a.bias": torch.ones(8),
        "b.weight": torch.zeros(8, 6, dtype=torch.int8),
        "b.SCB": torch.ones(8),
        "c.weight": torch.ones(8, 6),
        "position_ids": torch.arange(7),
    }
    with open_weights(saved(tmp_path / "m.safetensors", tensors)) as base:
        assert set(base.sites) == {"c"}
        assert base.packed == {"a": torch.uint8, "b": torch.int8}


# -- pipelines ---------------------------------------------------------------------------------------------------------
def test_the_tiny_pipeline_from_its_folder(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from nerine.model.pipeline import as_model
    from nerine.tiny import load_pipeline
    from nerine.tiny.load import MODEL

    live = as_model(load_pipeline(), "test")
    spots = every_spot(live)
    with open_weights(MODEL) as base:
        lead = "text_encoder.text_model."  # of CLIP's files; the module itself lost it with transformers 5
        own = {path.replace(lead, "text_encoder."): path for path in base.sites}
        assert set(own) == set(spots)
        for path, spot in spots.items():
            assert torch.equal(wide(base.weight(own[path])), weight_at(spot.holder, spot)), path
        for preset in ("attn-only", "attn-mlp", "full", "unet-only", "all"):
            chosen = {path.replace(lead, "text_encoder.") for path in select(base.model, preset)}
            assert chosen == set(select(live, preset)), preset


def test_layers_that_have_another_name_here_are_not_missing(tmp_path: Path) -> None:
    """The settings in a file name layers as the trained model had them, and CLIP's files call them otherwise."""
    pytest.importorskip("diffusers")
    from nerine.files.folder import open_adapter
    from nerine.tiny import load_pipeline
    from nerine.tiny.load import MODEL

    network = nerine.attach(load_pipeline(), LoRA(rank=2), targets="attn-only")
    nerine.save(network, tmp_path / "a.safetensors")
    with open_weights(MODEL) as base, open_adapter(tmp_path / "a.safetensors") as source:
        found = read_adapter(source, base)
    assert len(found.layers) == len(list(network.adapters()))
    assert any(path.startswith("text_encoder.text_model.") for path in found.layers)
    assert found.report.missing == ()
    assert found.report.unmatched == {}


def all_in_one() -> dict[str, Tensor]:
    """A little of SDXL under the names of its own checkpoints."""
    names = {
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (8, 8),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (8, 8),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight": (8, 8),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_v.weight": (8, 8),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.weight": (8, 8),
        "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
        "model.diffusion_model.out.2.weight": (4, 8, 3, 3),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": (6, 6),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.k_proj.weight": (6, 6),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.v_proj.weight": (6, 6),
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (48, 16),
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.out_proj.weight": (16, 16),
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight": (64, 16),
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_proj.weight": (16, 64),
        "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
        "model_ema.decay": (),
    }
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator).half() for name, shape in names.items()}


def test_an_all_in_one_file_is_its_parts(tmp_path: Path) -> None:
    with open_weights(saved(tmp_path / "sdxl.safetensors", all_in_one())) as base:
        rows = "text_encoder_2.transformer.resblocks.0.attn.in_proj_weight[16:32]"
        assert {path.partition(".")[0] for path in base.sites} == {"diffusion_model", "text_encoder", "text_encoder_2"}
        assert torch.equal(
            base.weight(rows),
            all_in_one()["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"][16:32],
        )
        assert base.key("diffusion_model.out.2") == "model.diffusion_model.out.2.weight"
        assert set(select(base.model, "attn-only")) >= {
            "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0",
            "text_encoder_2.transformer.resblocks.0.attn.in_proj_weight",
        }


def lora(*stems: str, out: int = 8, inputs: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for stem in stems:
        tensors[f"{stem}.lora_down.weight"] = torch.randn(2, inputs, generator=generator)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(out, 2, generator=generator)
        tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    return tensors


def test_an_adapter_of_the_other_naming_finds_its_rows(tmp_path: Path) -> None:
    """kohya's names of the queries of the second text encoder are rows of open_clip's attention."""
    stem = "lora_te2_text_model_encoder_layers_0_self_attn_k_proj"
    given = lora(stem, out=16, inputs=16)
    with open_weights(saved(tmp_path / "sdxl.safetensors", all_in_one())) as base:
        found = read_adapter(Source.of(given, path="style.safetensors"), base)
        ((path, layer),) = found.layers.items()
        assert path == "text_encoder_2.transformer.resblocks.0.attn.in_proj_weight[16:32]"
        assert layer.base is not None
        assert layer.base.weight().shape == (16, 16)


# -- adapters ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", [LoRA(rank=2, alpha=1), DoRA(LoKr(rank=1, alpha=2)), BOFT(block_size=2), Full()])
def test_an_adapter_is_beside_its_weight(tmp_path: Path, algorithm: nerine.LoRA) -> None:
    model = Model()
    path = saved(tmp_path / "m.safetensors", model.state_dict())
    network = nerine.attach(model, algorithm, targets=["to_qkv", "conv", "head"])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
    want = {own: layer.weight.detach().clone() for own, layer in model.named_modules() if own == "blocks.1.to_qkv"}
    nerine.save(network, tmp_path / "a.safetensors")
    network.merge()
    from nerine.files.folder import open_adapter

    with open_weights(path) as base, open_adapter(tmp_path / "a.safetensors") as source:
        found = read_adapter(source, base)
        assert set(found.layers) == {f"blocks.{i}.{n}" for i in range(2) for n in ("to_qkv", "conv")} | {"head"}
        layer = found.layers["blocks.1.to_qkv"]
        assert layer.base is not None
        assert torch.equal(layer.base.weight(), want["blocks.1.to_qkv"])
        record = layer.record()
        with torch.no_grad():
            deviation = record.algorithm.weight_deviation(record.params, layer.base.weight())
        merged = model.blocks[1].to_qkv.weight  # type: ignore[union-attr]
        assert torch.allclose(layer.base.weight() + deviation, merged, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]


def test_a_t_lora_without_what_it_started_from_is_completed(tmp_path: Path) -> None:
    algorithm = TLoRA(rank=2, alpha=1)
    site = nn.Linear(8, 24)
    from nerine.model.layer import site_of

    params = algorithm.start(site_of(site), site.weight.detach())
    names = {"q": "q_layer.weight", "p": "p_layer.weight", "lambda": "lambda_layer"}
    layout = algorithm.layout_of(set(names))
    tensors = {f"lora_unet_to_qkv.{spec.key}": params.tensors[n] + 0.1 for n, spec in layout.specs.items()}
    path = saved(tmp_path / "m.safetensors", {"to_qkv.weight": site.weight.detach()})
    with open_weights(path) as base:
        found = read_adapter(Source.of({**tensors, "lora_unet_to_qkv.alpha": torch.tensor(1.0)}), base)
        layer = found.layers["to_qkv"]
        assert {"base_q", "base_p", "base_lambda"} <= set(layer.shapes)
        assert {"base_q", "base_p", "base_lambda"} <= set(layer.record().params.tensors)


def test_without_a_base_there_is_none_beside() -> None:
    found = read_adapter(Source.of(lora("lora_unet_mid_block_attentions_0_proj_in")))
    assert all(layer.base is None for layer in found.layers.values())


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    with (
        open_weights(saved(tmp_path / "m.safetensors", Model().state_dict())) as base,
        pytest.raises(FormatError, match="none of its 3 keys belongs to this model"),
    ):
        read_adapter(Source.of(lora("lora_unet_nowhere")), base)


def test_the_index_and_the_folder_are_bases_too(tmp_path: Path) -> None:
    model = Model()
    state = model.state_dict()
    half = len(state) // 2
    names = list(state)
    files = {"m-1.safetensors": names[:half], "m-2.safetensors": names[half:]}
    for file, own in files.items():
        saved(tmp_path / file, {name: state[name] for name in own})
    where = {name: file for file, own in files.items() for name in own}
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}), encoding="utf-8")
    for path in (index, tmp_path):
        with open_weights(path) as base:
            assert isinstance(base, Weights)
            assert torch.equal(base.weight("head"), state["head.weight"])
            assert torch.equal(base.weight("blocks.0.to_qkv"), state["blocks.0.to_qkv.weight"])
