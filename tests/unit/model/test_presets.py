"""Presets: what each of them chooses, part by part of a pipeline, and that a slip in one is named."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

import nerine
from meta_models import make
from nerine import IA3, LoRA, OptionError, Rule, TargetError
from nerine.model.presets import PRESETS, Preset, preset_of, select
from target_models import DENOISERS, EXCEPTIONS, LANGUAGE, denoiser, language
from targets_tables import DOCUMENT, counts, experts_of, versions, written

WITHOUT_ATTENTION = {"ConvNeXt", "Mamba", "Mamba 2", "ResNet"}
WITH_PARAMETERS = {"XLNet"}  # whose projections are parameters that no layer calls
UNET = ("unet-only", "unet-transformer-only", "unet-convblock-only")


def unet() -> nn.Module:
    return denoiser("Stable Diffusion 1")


def clip() -> nn.Module:
    return language("CLIP text")


def test_their_names() -> None:
    assert set(PRESETS) >= {"all", "full", "full-lin", "attn-mlp", "attn-only", *UNET, "ia3"}
    assert all(preset_of(name).about for name in PRESETS)


@pytest.mark.parametrize("name", DENOISERS)
def test_every_denoiser_has_layers_for_every_preset(name: str) -> None:
    found = counts(denoiser, name)
    assert [preset for preset, count in found.items() if not count and preset != "unet-convblock-only"] == []
    assert found["all"] >= found["full"] >= found["full-lin"] >= found["attn-mlp"] >= found["attn-only"]
    assert found["full"] == found["unet-only"]
    assert found["attn-mlp"] == found["unet-transformer-only"]
    assert found["ia3"] < found["attn-mlp"]


@pytest.mark.parametrize("name", LANGUAGE)
def test_every_model_of_transformers_too(name: str) -> None:
    found = counts(language, name)
    wanted = {"all", "full", "full-lin"}
    if name not in WITHOUT_ATTENTION:
        wanted |= {"attn-mlp", "attn-only", "ia3"} - ({"attn-only"} if name in WITH_PARAMETERS else set())
    assert {preset for preset, count in found.items() if count and preset not in UNET} == wanted


def test_every_class_of_diffusers_is_covered() -> None:
    known = {kind for kind, _ in DENOISERS.values()} | set(EXCEPTIONS)
    diffusers = importlib.import_module("diffusers")
    found = set()
    for folder in ("transformers", "unets"):
        package = importlib.import_module(f"diffusers.models.{folder}")
        for entry in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{entry.name}")
            kinds = (c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__)
            found |= {c.__name__ for c in kinds if issubclass(c, diffusers.ModelMixin)}
    assert sorted(found - known) == []


def test_the_document_has_the_tables_of_the_code() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    if versions() not in text:
        pytest.skip(f"counted in other versions than {versions()}")
    assert written(text) == text, "cd tests && PYTHONPATH=. python -m targets_tables"


def test_full_of_a_unet_is_everything_and_of_sdxl_all_but_an_embedder() -> None:
    assert select(unet(), "full") == select(unet(), "all")
    sdxl = denoiser("SDXL")
    assert set(select(sdxl, "all")) - set(select(sdxl, "full")) == {"add_embedding.linear_1", "add_embedding.linear_2"}


def ends(paths: tuple[str, ...]) -> set[str]:
    """The last names of paths, numbers aside."""
    return {[name for name in path.split(".") if not name.isdigit()][-1] for path in paths}


def test_the_parts_of_a_unet() -> None:
    assert ends(select(unet(), "attn-only")) == {"to_q", "to_k", "to_v", "to_out"}
    assert ends(select(unet(), "attn-mlp")) == {
        *ends(select(unet(), "attn-only")),
        "proj",
        "net",
        "proj_in",
        "proj_out",
    }
    convs = select(unet(), "unet-convblock-only")
    assert ends(convs) == {"conv_in", "conv1", "conv2", "time_emb_proj", "conv_shortcut", "conv", "conv_out"}
    assert ends(select(unet(), "full-lin")) - ends(select(unet(), "attn-mlp")) == {
        "linear_1",
        "linear_2",
        "time_emb_proj",
        "conv_shortcut",
    }
    assert set(convs) | set(select(unet(), "attn-mlp")) == set(select(unet(), "full")) - {
        "time_embedding.linear_1",
        "time_embedding.linear_2",
    }
    assert ends(select(unet(), "ia3")) == {"to_k", "to_v", "net"}


@pytest.mark.parametrize(
    ("build", "name", "down"),
    [
        (denoiser, "Flux", {"transformer_blocks.0.ff.net.2", "transformer_blocks.0.ff_context.net.2"}),
        (denoiser, "Lumina 2", {"layers.0.feed_forward.linear_2"}),
        (denoiser, "AuraFlow", {f"joint_transformer_blocks.0.{ff}.out_projection" for ff in ("ff", "ff_context")}),
        (denoiser, "Sana", {"transformer_blocks.0.ff.conv_point"}),
        (denoiser, "Qwen-Image 2.1", {"transformer_blocks.0.img_mlp.out"}),
        (denoiser, "PRX", {"blocks.0.down_proj"}),
        (denoiser, "Kandinsky 5", {"visual_transformer_blocks.0.feed_forward.out_layer"}),
        (language, "T5", {"encoder.block.0.layer.1.DenseReluDense.wo"}),
        (language, "CLIP text", {"encoder.layers.0.mlp.fc2"}),
        (language, "BERT", {"encoder.layer.0.output.dense"}),
        (language, "GPT-2", {"transformer.h.0.mlp.c_proj"}),
        (language, "ModernBERT", {"layers.0.mlp.Wo"}),
        (language, "Llama", {"model.layers.0.mlp.down_proj"}),
        (language, "Whisper", {"encoder.layers.0.fc2", "decoder.layers.0.fc2"}),
    ],
)
def test_ia3_acts_on_the_input_of_the_second_feed_forward_layer(
    build: Callable[[str], nn.Module], name: str, down: set[str]
) -> None:
    rows = nerine.plan(build(name), IA3(), targets="ia3").rows
    on_input = {row.layer for row in rows if row.algorithm == "IA3(on_input=True)"}
    assert on_input >= down
    block = next(iter(down)).split(".0.")[0]
    assert {path for path in on_input if path.startswith(f"{block}.0.")} <= down
    assert not any(word in path for path in on_input for word in ("to_k", "to_v", "k_proj", "v_proj", "key", "value"))
    assert {row.algorithm for row in rows} == {"IA3()", "IA3(on_input=True)"}


def test_ia3_in_a_rule_and_with_another_algorithm() -> None:
    rows = nerine.plan(clip(), [Rule("ia3", IA3())]).rows
    assert [row.algorithm for row in rows] == ["IA3()", "IA3()", "IA3(on_input=True)"] * 2
    plain = nerine.plan(clip(), LoRA(rank=2), targets="ia3").rows
    assert [row.layer for row in rows] == [row.layer for row in plain]
    assert {row.algorithm for row in plain} == {"LoRA(rank=2)"}
    assert {row.algorithm for row in nerine.plan(clip(), IA3(), targets="full").rows} == {"IA3()"}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_parts_of_a_pipeline(preset: str) -> None:
    parts = {"vae": nn.Sequential(nn.Conv2d(3, 4, 3)), "text_encoder": clip(), "unet": unet()}
    pipeline = nn.ModuleDict({**parts, "text_encoder_2": language("CLIP text, with projection")})
    found = select(pipeline, preset)
    by_part = {part: [p.removeprefix(f"{part}.") for p in found if p.startswith(f"{part}.")] for part in pipeline}
    assert by_part["unet"] == list(select(unet(), preset))
    if preset in UNET:
        assert not by_part["text_encoder"] + by_part["text_encoder_2"]
    else:
        assert by_part["text_encoder"] == list(select(clip(), preset))
        assert by_part["text_encoder_2"]
    assert by_part["vae"] == (["0"] if preset == "all" else [])
    assert found == tuple(row.layer for row in nerine.plan(pipeline, LoRA(rank=2), targets=preset).rows)


def test_the_component_may_be_said() -> None:
    assert select(clip(), "unet-only", "denoiser") == select(clip(), "full")
    with pytest.raises(TargetError):
        select(unet(), "unet-only", "text_encoder")
    with pytest.raises(OptionError, match="component must be"):
        select(unet(), "full", "unet")


def test_a_dictionary_of_other_parts_is_one_model() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Conv2d(3, 4, 3)})
    assert select(model, "full") == ("a", "b")
    assert select(model, "full-lin") == ("a",)


@pytest.mark.parametrize("preset", UNET)
def test_a_text_encoder_alone(preset: str) -> None:
    with pytest.raises(TargetError) as caught:
        select(clip(), preset)
    words = str(caught.value)
    assert f"the preset '{preset}' (" in words
    assert "chooses no layer of CLIPTextModel. It takes nothing of text encoders" in words
    assert "Candidates: encoder.layers.0.self_attn.k_proj (Linear)" in words
    with pytest.raises(TargetError, match="It takes nothing of text encoders"):
        nerine.plan(clip(), LoRA(rank=2), targets=preset)


def test_blocks_of_convolutions_where_there_are_none() -> None:
    with pytest.raises(TargetError, match=r"'unet-convblock-only' .* chooses no layer of FluxTransformer2DModel\. "):
        nerine.plan(denoiser("Flux"), LoRA(rank=2), targets="unet-convblock-only")
    with pytest.raises(TargetError, match="Sequential has no layer of a kind that nerine knows"):
        select(nn.Sequential(nn.ReLU()), "full")


def test_no_preset_takes_experts_and_a_pattern_does() -> None:
    model = language("Mixtral")
    assert experts_of(model) == ["model.layers.*.mlp.experts.gate_up_proj", "model.layers.*.mlp.experts.down_proj"]
    assert not any("experts" in path for preset in ("all", "full", "attn-mlp") for path in select(model, preset))
    rules = [Rule("experts.down_proj", LoRA(rank=2)), Rule("attn-only", LoRA(rank=3))]
    rows = {row.layer: row for row in nerine.plan(model, rules, targets="full").rows}
    assert rows["model.layers.1.mlp.experts.down_proj"].tensors["up"] == (4, 32, 2)
    assert rows["model.layers.1.self_attn.q_proj"].algorithm == "LoRA(rank=3)"
    assert len(rows) == 10
    (first, _) = nerine.plan(model, LoRA(rank=2), targets="experts.down_proj").rows
    assert first.layer == "model.layers.0.mlp.experts.down_proj"


def test_norms_with_a_preset() -> None:
    plan = nerine.plan(clip(), LoRA(rank=2), targets="attn-only", train_norm=True)
    assert {row.kind for row in plan.rows} == {"Linear", "LayerNorm"}
    only = nerine.plan(clip(), nerine.Norm(), targets="attn-only")
    assert {row.kind for row in only.rows} == {"LayerNorm"}


def test_adapters_on_a_model_do_not_change_what_a_preset_means() -> None:
    model = make("transformers", *LANGUAGE["CLIP text"][::2], LANGUAGE["CLIP text"][1])
    before = {preset: select(model, preset, "denoiser") for preset in PRESETS if preset != "unet-convblock-only"}
    nerine.attach(model, LoRA(rank=2))
    assert {preset: select(model, preset, "denoiser") for preset in before} == before


SECTION = '[denoiser]\nwhere = ["block"]\nkinds = ["linear"]\n'


def test_a_preset_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(SECTION + 'leave_out = ["attn[12]", "proj_*"]\n', encoding="utf-8")
    found = select(unet(), str(file))
    assert ends(found) == {"time_emb_proj", "proj", "net"}
    assert [row.layer for row in nerine.plan(unet(), LoRA(rank=2), targets=str(file)).rows] == list(found)
    with pytest.raises(TargetError):
        select(clip(), str(file))
    with pytest.raises(OptionError, match=r"none\.toml: the preset cannot be read"):
        select(unet(), str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[unet]", "mine: no setting is called 'unet'"),
        ("[denoisr]", "Did you mean 'denoiser'"),
        ("denoiser = 5", r"mine, \[denoiser\]: expected a table, got 5"),
        (SECTION + "kind = []", "no setting is called 'kind'. Did you mean 'kinds'"),
        (SECTION + 'otherwise = "all"', "otherwise knows no 'all'"),
        (SECTION + 'unet = "conv_in"', "unet must be a list of texts, got 'conv_in'"),
        (SECTION + 'on_input = ["downs"]', "on_input knows no 'downs'. Did you mean 'down'"),
        ('[denoiser]\nwhere = ["blocks"]', "where knows no 'blocks'. Did you mean 'block'"),
        ('[text_encoder]\nkinds = ["lin"]', r"mine, \[text_encoder\]: kinds knows no 'lin'. Did you mean 'linear'"),
        ("[denoiser", "mine: not valid TOML"),
    ],
)
def test_a_slip_in_a_preset_is_named(text: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Preset.read(text, "mine")


def test_an_unknown_preset() -> None:
    with pytest.raises(OptionError, match=r"no preset is called 'atn-only'\. Did you mean 'attn-only'"):
        select(unet(), "atn-only")
