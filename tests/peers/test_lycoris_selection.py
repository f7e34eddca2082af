"""The same models and presets through LyCORIS 4.1.3's own walk: the same layers, in the same order, of the same kind
and rank; and the places where that walk stops or takes the wrong options, which ours does not follow."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from torch import nn

from meta_models import CLIP, UNETS
from nerine.integrations.lycoris.selection import Targets, selected, targets_of, unmatched

lycoris = pytest.importorskip("lycoris", reason="needs lycoris-lora: pip install 'nerine[peers]'")

LycorisNetworkKohya = lycoris.kohya.LycorisNetworkKohya
LycorisNetwork = lycoris.LycorisNetwork

pytestmark = [pytest.mark.peers, pytest.mark.no_device_guard]

CLASSES = {
    None: "LoConModule",
    "lora": "LoConModule",
    "locon": "LoConModule",
    "loha": "LohaModule",
    "lokr": "LokrModule",
    "full": "FullModule",
    "norm": "NormModule",
}
DIM, CONV_DIM = 4, 2


@pytest.fixture(autouse=True)
def _own_classes() -> Iterator[None]:
    """LyCORIS keeps presets on its classes: what a test sets there is taken back."""
    kept = [
        (kind, {k: v for k, v in vars(kind).items() if k.isupper()}) for kind in (LycorisNetwork, LycorisNetworkKohya)
    ]
    yield
    for kind, values in kept:
        for name, value in values.items():
            setattr(kind, name, value)


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_in = nn.Linear(6, 10)
        self.depth = nn.Conv2d(6, 10, 3)
        self.point = nn.Conv2d(6, 10, 1)
        self.tall = nn.Conv2d(6, 10, (1, 3))
        self.norm = nn.LayerNorm(10)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = Mix()
        self.to_out = nn.Linear(10, 6)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deep = Deep()
        self.mix = Mix()
        self.side = nn.Conv1d(4, 6, 5)
        self.norm = nn.GroupNorm(2, 6)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Outer(), Outer()])
        self.conv_in = nn.Conv2d(3, 6, 3)
        self.conv_in_more = nn.Conv2d(3, 6, 3)
        self.head = nn.Linear(6, 5)
        self.mix = Mix()
        self.norm = nn.LayerNorm(6)


@cache
def model_of(name: str) -> nn.Module:
    if name == "small":
        return Small()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other libraries say about themselves
        import diffusers
        import transformers

        layers: dict[str, Any] = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
        if name == "unet":
            return diffusers.UNet2DConditionModel(**UNETS["two levels"])
        if name == "sd3":
            small = {"caption_projection_dim": 32, "joint_attention_dim": 24, "pooled_projection_dim": 20}
            return diffusers.SD3Transformer2DModel(**layers, **small, qk_norm="rms_norm", sample_size=8)
        if name == "flux":
            small = {"joint_attention_dim": 24, "pooled_projection_dim": 20, "axes_dims_rope": (4, 6, 6)}
            return diffusers.FluxTransformer2DModel(**layers, **small, num_single_layers=2, guidance_embeds=True)
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP))


def expected(loras: Any, prefix: str) -> list[tuple[str, str, int]]:
    """Name, class and rank of LyCORIS's modules; 0 where there is no rank."""
    return [
        (lora.lora_name, type(lora).__name__, getattr(lora, "lora_dim", 0) if hasattr(lora, "alpha") else 0)
        for lora in loras
        if lora.lora_name.startswith(prefix)
    ]


def found(model: nn.Module, chosen: dict[str, dict[str, Any]], prefix: str) -> list[tuple[str, str, int]]:
    rows = []
    for path, options in chosen.items():
        module = model.get_submodule(path)
        is_wide = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.kernel_size[0] != 1
        dim = options.get("dim") or (CONV_DIM if is_wide else DIM)
        algo = options.get("algo")
        if algo in ("norm", "full"):
            dim = 0
        rows.append((f"{prefix}_{path}".replace(".", "_"), CLASSES[algo], dim))
    return rows


def wrapper_walk(model: nn.Module, preset: dict[str, Any], **options: Any) -> list[tuple[str, str, int]]:
    LycorisNetwork.apply_preset(preset)
    network = LycorisNetwork(model, lora_dim=DIM, conv_lora_dim=CONV_DIM, warn_on_unmatched=False, **options)
    return expected(network.loras, "lycoris")


def ours(
    model: nn.Module, preset: dict[str, Any], part: str = "", default: Targets | None = None, **options: Any
) -> Any:
    targets = targets_of(preset, part) if default is None else targets_of(preset, part, default)
    return selected(model, preset, target_modules=targets.modules, target_names=targets.names, **options)


PRESETS: dict[str, dict[str, Any]] = {
    "nothing said": {},
    "no convolutions": {"enable_conv": False},
    "classes": {"target_module": ["Mix", "Attention", "JointTransformerBlock", "FluxSingleTransformerBlock"]},
    "exact names": {
        "target_module": [],
        "target_name": ["conv_in", "head", "blocks.0.deep.to_out", "proj_out", "mid_block.attentions.0.proj_in"],
    },
    "a name fits the beginning": {"target_module": [], "target_name": ["conv_in", "blocks.1", "down_blocks"]},
    "regular expressions": {
        "target_module": [],
        "target_name": [r".*\.to_(in|out)", r"blocks\.\d+\.mix", r".*attn.*\.to_[qk]$", r"^transformer_blocks\.1"],
    },
    "shell patterns": {
        "target_module": [],
        "target_name": ["*.to_in", "blocks.?.side", "*.attn*.to_[qv]", "*ff*"],
        "use_fnmatch": True,
    },
    "classes and names": {"target_module": ["Outer", "Transformer2DModel"], "target_name": ["head", "conv_in"]},
    "a name takes a block out": {"target_module": ["Deep", "Mix"], "target_name": [r"blocks\.0\.deep$", "mix$"]},
    "excluded": {
        "target_module": ["Linear", "Conv2d", "Outer"],
        "exclude_name": [r"blocks\.1", "head", r".*attn2", r".*\.norm"],
    },
    "a block excluded alone": {"target_module": ["Mix"], "exclude_name": [r"blocks\.0\.mix$", r".*\.point$"]},
    "excluded, shell patterns": {
        "target_module": ["Linear"],
        "exclude_name": ["blocks.*.to_in", "*.to_k", "head"],
        "use_fnmatch": True,
    },
    "options of classes": {
        "target_module": ["Linear"],
        "module_algo_map": {"Mix": {"algo": "lokr", "dim": 3, "factor": 2}, "Attention": {"algo": "loha"}},
    },
    "blocks within blocks": {
        "target_module": ["Outer"],
        "module_algo_map": {
            "Outer": {"algo": "loha", "dim": 5},
            "Deep": {"dim": 3},
            "Mix": {"algo": "lokr", "alpha": 2.0},
            "Transformer2DModel": {"algo": "lokr", "dim": 3},
            "BasicTransformerBlock": {"dim": 2},
            "Attention": {"algo": "full"},
        },
    },
    "a rank brings convolutions back": {
        "enable_conv": False,
        "target_module": ["Outer"],
        "module_algo_map": {"Mix": {"dim": 3}, "Outer": {"algo": "loha"}},
    },
    "the outer block has the rank": {
        "enable_conv": False,
        "module_algo_map": {"Mix": {"algo": "loha"}, "Outer": {"algo": "lokr", "dim": 3}},
        "target_module": [],
    },
    "options of names": {
        "target_module": ["Mix"],
        "name_algo_map": {
            "head": {"algo": "lokr", "dim": 2},
            r"conv_in": {"algo": "loha"},
            "conv_in_more": {"algo": "full"},
            r"blocks\.0\.side": {"dim": 7, "algo": "loha"},
            r".*\.side": {"dim": 6},
            r".*attn1\.to_q": {"algo": "lokr"},
            r".*to_[qk]$": {"algo": "loha", "dim": 3},
        },
    },
    "options of names, shell patterns": {
        "target_module": [],
        "use_fnmatch": True,
        "name_algo_map": {"*.to_q": {"algo": "lokr"}, "*.mix.*": {"algo": "loha", "dim": 2}, "*.deep.*": {"dim": 3}},
    },
    "one layer as its own block": {"target_module": [], "module_algo_map": {"Conv1d": {"dim": 3, "algo": "lokr"}}},
}
MODELS = ["small", "unet", "sd3", "flux"]


@pytest.mark.parametrize("norms", [False, True], ids=["", "norms"])
@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_the_wrapper_takes_the_same_layers_of_a_small_model(preset: dict[str, Any], norms: bool) -> None:
    model = model_of("small")
    want = wrapper_walk(model, {"target_module": list(PLAIN), **preset}, train_norm=norms)
    got = ours(model, {"target_module": list(PLAIN), **preset}, train_norm=norms)
    assert found(model, got, "lycoris") == want
    assert want


PLAIN = ("Linear", "Conv1d", "Conv2d", "Conv3d", "GroupNorm", "LayerNorm")


@pytest.mark.parametrize("name", MODELS[1:])
@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_the_wrapper_takes_the_same_layers_of_diffusers_models(preset: dict[str, Any], name: str) -> None:
    model = model_of(name)
    assert found(model, ours(model, preset), "lycoris") == wrapper_walk(model, preset)


UNET = Targets(
    tuple(LycorisNetworkKohya.UNET_TARGET_REPLACE_MODULE), tuple(LycorisNetworkKohya.UNET_TARGET_REPLACE_NAME)
)
TEXT = Targets(tuple(LycorisNetworkKohya.TEXT_ENCODER_TARGET_REPLACE_MODULE))
KOHYA: dict[str, dict[str, Any]] = {
    "nothing said": {},
    **{name: lycoris.config.PRESET[name] for name in lycoris.config.PRESET},
    "maps": {
        "unet_target_module": ["Transformer2DModel", "ResnetBlock2D", "Outer", "JointTransformerBlock"],
        "unet_target_name": ["conv_in", r"time_embedding\.linear", "head"],
        "text_encoder_target_module": ["CLIPMLP"],
        "text_encoder_target_name": [r".*\.q_proj"],
        "module_algo_map": {
            "Attention": {"algo": "lokr", "dim": 3},
            "Mix": {"algo": "full"},
            "CLIPMLP": {"algo": "loha"},
        },
        "name_algo_map": {"conv_in": {"algo": "loha", "dim": 3}, "text_model.encoder.layers.1": {"dim": 2}},
        "exclude_name": [r".*attn2\.to_v", r"text_model\.encoder\.layers\.0"],
    },
    "shell patterns": {
        "use_fnmatch": True,
        "enable_conv": False,
        "unet_target_module": [],
        "unet_target_name": ["*.to_out.0", "conv_*", "*.to_in"],
        "text_encoder_target_module": [],
        "text_encoder_target_name": ["*.fc1"],
        "name_algo_map": {"*.fc1": {"algo": "lokr"}, "conv_*": {"algo": "loha", "dim": 2}},
    },
}


@pytest.mark.parametrize("name", ["small", "unet", "sd3"])
@pytest.mark.parametrize("preset", KOHYA.values(), ids=list(KOHYA))
def test_sd_scripts_network_takes_the_same_layers(preset: dict[str, Any], name: str) -> None:
    unet, text = model_of(name), model_of("clip")
    targets = targets_of(preset, "unet", UNET)
    if name == "unet" and "TimestepEmbedding" in targets.modules:  # chosen by class and by name: see below
        preset = {**preset, "unet_target_name": [n for n in targets.names if not n.startswith("time_embedding")]}
    LycorisNetworkKohya.apply_preset(preset)
    network = LycorisNetworkKohya([text], unet, lora_dim=DIM, conv_lora_dim=CONV_DIM, warn_on_unmatched=False)
    assert found(unet, ours(unet, preset, "unet", UNET), "lora_unet") == expected(network.unet_loras, "lora_unet")
    got = found(text, ours(text, preset, "text_encoder", TEXT), "lora_te1")
    assert got == expected(network.text_encoder_loras, "lora_te1")


def test_what_matches_nothing_is_what_lycoris_warns_of(caplog: pytest.LogCaptureFixture) -> None:
    preset = {
        "target_module": ["Mix", "Nowhere"],
        "target_name": ["conv_in", r"gone\.\d"],
        "name_algo_map": {"nobody": {}},
    }
    LycorisNetwork.apply_preset(preset)
    logger = lycoris.logger
    logger.addHandler(caplog.handler)
    logger.setLevel("WARNING")
    try:
        LycorisNetwork(model_of("small"), lora_dim=DIM)
    finally:
        logger.removeHandler(caplog.handler)
    targets = targets_of(preset)
    missing = unmatched(model_of("small"), preset, target_modules=targets.modules, target_names=targets.names)
    assert missing == Targets(("Nowhere",), (r"gone\.\d", "nobody"))
    assert [str(list(missing.modules)) in caplog.text, str(list(missing.names)) in caplog.text] == [True, True]


# -- where ours does not follow --------------------------------------------------------------------------------------
def test_the_presets_work_on_a_unet_of_diffusers() -> None:
    """LyCORIS's default preset names the class TimestepEmbedding and the two layers in it."""
    model, preset = model_of("unet"), lycoris.config.PRESET["full"]
    LycorisNetworkKohya.apply_preset(preset)
    with pytest.raises(AssertionError, match="duplicated lora name: lora_unet_time_embedding_linear_1"):
        LycorisNetworkKohya(None, model, lora_dim=DIM, warn_on_unmatched=False)
    assert list(ours(model, preset, "unet", UNET))[1:3] == ["time_embedding.linear_1", "time_embedding.linear_2"]


def test_the_names_of_the_ia3_preset_match_nothing_in_a_unet() -> None:
    """They must fit the beginning of a path, and stand at its end. Kept: the preset says what it says."""
    model, preset = model_of("unet"), lycoris.config.PRESET["ia3"]
    LycorisNetworkKohya.apply_preset(preset)
    network = LycorisNetworkKohya(None, model, lora_dim=DIM, network_module="ia3", warn_on_unmatched=False)
    assert len(network.unet_loras) == len(ours(model, preset, "unet", UNET)) == 0


def test_blocks_that_overlap_are_no_error() -> None:
    model, preset = model_of("small"), {"unet_target_module": ["Outer", "Deep"], "unet_target_name": []}
    LycorisNetworkKohya.apply_preset(preset)
    with pytest.raises(AssertionError, match="duplicated lora name"):
        LycorisNetworkKohya(None, model, lora_dim=DIM, warn_on_unmatched=False)
    alone = {"unet_target_module": ["Outer"], "unet_target_name": []}
    assert ours(model, preset, "unet", UNET) == ours(model, alone, "unet", UNET)


def test_the_options_of_one_name_do_not_reach_the_next_block() -> None:
    """A name met a second time leaves its options to the next block in LyCORIS's walk."""
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 5)), "b": Mix()})
    preset = {
        "target_module": ["Sequential", "Mix"],
        "name_algo_map": {r"a\.0": {"algo": "lokr", "dim": 3}},
    }
    want = wrapper_walk(model, preset)
    assert want[1] == ("lycoris_b_to_in", "LoConModule", 3)
    assert found(model, ours(model, preset), "lycoris")[1] == ("lycoris_b_to_in", "LoConModule", 4)


def test_paths_that_look_alike_in_files_are_both_taken() -> None:
    model = nn.ModuleDict({"a_b": nn.Linear(3, 5), "a": nn.ModuleDict({"b": nn.Linear(4, 6)})})
    assert [name for name, *_ in wrapper_walk(model, {"target_module": ["Linear"]})] == ["lycoris_a_b"]
    assert list(ours(model, {"target_module": ["Linear"]})) == ["a_b", "a.b"]


def test_norms_without_a_weight_are_left_out_and_rms_norms_are_not() -> None:
    model = nn.ModuleDict({"bare": nn.LayerNorm(4, elementwise_affine=False), "rms": nn.RMSNorm(4)})
    preset = {"target_module": ["LayerNorm"]}
    assert [name for name, *_ in wrapper_walk(model, preset, train_norm=True)] == ["lycoris_bare"]  # fails when called
    assert ours(model, preset, train_norm=True) == {}
    assert ours(model, {"target_module": ["RMSNorm"]}, train_norm=True) == {"rms": {"algo": "norm"}}


def test_a_module_in_two_places_is_taken_once() -> None:
    shared = nn.Linear(3, 5)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared, nn.Linear(5, 2))})
    preset = {"target_module": ["Sequential"]}
    assert [name for name, *_ in wrapper_walk(model, preset)] == ["lycoris_a_0", "lycoris_b_0", "lycoris_b_1"]
    assert list(ours(model, preset)) == ["a.0", "b.1"]
