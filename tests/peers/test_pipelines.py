"""Whole pipelines of diffusers: loaded, merged, saved, and as diffusers itself loads the same file."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nerine
from nerine import DoRA, FormatError, LoKr, LoRA, MergeError, Network, OptionError, TargetError
from peers.stirred import stir

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'nerine[train]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'nerine[train]'")
peft = pytest.importorskip("peft", reason="needs peft: pip install 'nerine[peers]'")
safetensors = pytest.importorskip("safetensors")
pytest.importorskip("safetensors.torch")

from tiny_pipelines import ENCODERS, PIPELINES, run, sd, sdxl  # noqa: E402

pytestmark = [
    pytest.mark.peers,
    pytest.mark.no_device_guard,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Already unmerged"),
]
ALL = ["attn", "attn1", "attn2", "self_attn", "mlp", "SelfAttention", "ff"]
PARTS = ["unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    names = ("diffusers", "transformers", "peft")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def adapted(pipe: Any, algorithm: Any = LoRA(rank=2, alpha=3), **more: Any) -> Network:  # noqa: B008
    network = nerine.attach(pipe, algorithm, **{"targets": ALL, **more})
    stir(network.parameters())
    return network


def equal(got: Tensor, want: Tensor, base: Tensor, tolerance: float = 1e-4) -> None:
    """Equal as far as the change goes: a missing part would be of its size."""
    change = (want - base).norm()
    assert float(change) > 1e-3 * float(base.norm())
    assert float((got - want).norm()) <= tolerance * float(change)


@pytest.mark.parametrize("dialect", ["lycoris", "kohya", "diffusers", "comfy"])
@pytest.mark.parametrize("name", PIPELINES)
def test_all_parts_of_a_file_are_loaded_at_once(name: str, dialect: str, tmp_path: Path) -> None:
    make, file = PIPELINES[name], tmp_path / "a.safetensors"
    pipe = make()
    base = run(pipe)
    network = adapted(pipe)
    parts = {path.split(".")[0] for path, *_ in network.adapters()}
    assert len(parts) == 1 + ENCODERS[name]
    assert parts <= set(PARTS)
    want = run(pipe)
    nerine.save(network, file, dialect=dialect)

    other = make()
    loaded = nerine.load(other, file, strict=True)
    assert {path.split(".")[0] for path, *_ in loaded.adapters()} == parts
    equal(run(other), want, base)
    loaded.merge()
    equal(run(other), want, base)
    loaded.unmerge()
    loaded.off()
    assert torch.equal(run(other), base)
    loaded.detach()
    assert torch.equal(run(other), base)


@pytest.mark.parametrize("name", PIPELINES)
def test_as_diffusers_loads_the_same_file(name: str, tmp_path: Path) -> None:
    """Of T5 encoders diffusers reads none, so those are left out."""
    make, file = PIPELINES[name], tmp_path / "a.safetensors"
    mine, theirs = make(), make()
    base = run(mine)
    network = adapted(mine, targets=["attn", "attn1", "attn2", "self_attn", "ff"])
    nerine.save(network, file, dialect="diffusers")
    theirs.load_lora_weights(file)
    equal(run(mine), run(theirs), base)
    network.merge()
    equal(run(mine), run(theirs), base)


def test_t5_of_flux_under_the_name_that_sd_scripts_gives_it(tmp_path: Path) -> None:
    """The third text encoder in a file, the second of the pipeline."""
    pipe = PIPELINES["flux"]()
    network = adapted(pipe)
    nerine.save(network, tmp_path / "a.safetensors", dialect="kohya")
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    renamed = {key.replace("lora_te2_", "lora_te3_"): t for key, t in tensors.items()}
    assert renamed.keys() != tensors.keys()
    safetensors.torch.save_file(renamed, tmp_path / "b.safetensors")
    other = PIPELINES["flux"]()
    loaded = nerine.load(other, tmp_path / "b.safetensors", strict=True)
    assert {p for p, *_ in loaded.adapters() if "text" in p} == {p for p, *_ in network.adapters() if "text" in p}
    equal(run(other), run(pipe), run(PIPELINES["flux"]()))


def test_parts_are_referred_to_and_nothing_else() -> None:
    """The pipeline has the same parts, which have no more than their adapters; all of it can be copied and pickled."""
    pipe = sd()
    before = dict(pipe.components)
    keys = {name: set(part.state_dict()) for name, part in before.items() if isinstance(part, nn.Module)}
    network = adapted(pipe, DoRA(LoRA(rank=2)))
    assert all(pipe.components[name] is part for name, part in before.items())
    assert network.model.unet is pipe.unet
    assert set(network.model._modules) == {"unet", "text_encoder"}
    assert all(path.startswith(("unet.", "text_encoder.")) for path, *_ in network.adapters())
    want, copied = run(pipe), copy.deepcopy(pipe.unet)
    other = sd()
    other.unet, other.text_encoder = copied, pickle.loads(pickle.dumps(pipe.text_encoder))
    assert torch.equal(run(other), want)
    assert len(Network.of(other)) == len(network)
    pipe.to(torch.float64)
    assert all(t.dtype == torch.float32 for t in network.parameters())
    pipe.to(torch.float32)
    network.detach()
    assert keys == {name: set(part.state_dict()) for name, part in before.items() if isinstance(part, nn.Module)}
    assert not any("save_pretrained" in part.__dict__ for part in before.values() if isinstance(part, nn.Module))


def test_the_network_need_not_be_kept(tmp_path: Path) -> None:
    pipe = sd()
    network = adapted(pipe)
    want = run(pipe)
    nerine.save(network, tmp_path / "a.safetensors")
    other = sd()
    nerine.load(other, tmp_path / "a.safetensors")
    assert torch.equal(run(other), want)
    Network.of(other).strength = 0
    assert torch.equal(run(other), run(sd()))


def test_a_part_sees_the_same_adapters_under_its_own_names(tmp_path: Path) -> None:
    """What was put on through the pipeline can be saved, set and resumed through a part, and the other way round."""
    pipe = sdxl()
    whole = adapted(pipe)
    part = Network.of(pipe.unet)
    assert [f"unet.{path}" for path, *_ in part.adapters()] == [p for p, *_ in whole.adapters() if p.startswith("unet")]
    assert part.set_strength(0.5, "up_blocks") == whole.set_strength(0.5, "unet.up_blocks") > 0
    nerine.save(part, tmp_path / "unet.safetensors", dialect="kohya")
    alone = sdxl()
    loaded = nerine.load(alone.unet, tmp_path / "unet.safetensors", strict=True)
    assert len(loaded) == len(part)
    nerine.load(part, tmp_path / "unet.safetensors", strict=True)
    second = nerine.attach(pipe, LoRA(rank=1), name="second", targets="text_encoder_2.text_model.encoder")
    third = nerine.attach(pipe.unet, LoRA(rank=1), name="third", targets="attn1")
    assert all(path.startswith("text_encoder_2.") for path, *_ in second.adapters())
    assert all(path.startswith("down_blocks") for path, *_ in list(third.adapters())[:1])
    both = Network.of(pipe)
    assert set(both.names) == {"default", "second", "third"}
    assert all(path.startswith(("unet.", "text_encoder")) for path, *_ in both.adapters())


def test_a_compiled_part_is_the_part_itself(tmp_path: Path) -> None:
    pipe = sd()
    network = adapted(pipe)
    want = run(pipe)
    nerine.save(network, tmp_path / "a.safetensors")
    other = sd()
    other.unet = torch.compile(other.unet, backend="eager")
    loaded = nerine.load(other, tmp_path / "a.safetensors", strict=True)
    assert [p for p, *_ in loaded.adapters()] == [p for p, *_ in network.adapters()]
    assert torch.equal(run(other, steps=2), want)


# -- strengths -------------------------------------------------------------------------------------------------------
def test_several_adapters_with_strengths_by_part_and_block(tmp_path: Path) -> None:
    makers = {"a": LoRA(rank=2, alpha=3), "b": DoRA(LoKr(rank=2, factor=2))}
    strengths: dict[str, Any] = {
        "a": {"unet": 0.8, "text_encoder": 0.4, "unet.up_blocks": 1.5, "text_encoder_2": 0.0},
        "b": 0.7,
    }
    pipe = sdxl()
    for i, (name, algorithm) in enumerate(makers.items()):
        source = sdxl()
        network = nerine.attach(source, algorithm, targets=ALL)
        stir(network.parameters(), seed=i)
        nerine.save(network, tmp_path / f"{name}.safetensors")
        nerine.load(pipe, tmp_path / f"{name}.safetensors", name=name, strength=strengths[name])
    a, b = Network.of(pipe)["a"], Network.of(pipe)["b"]
    found = {path: adapter.strength for path, _, adapter in a.adapters()}
    assert {s for path, s in found.items() if path.startswith("unet.up_blocks")} == {1.5}
    assert {s for path, s in found.items() if path.startswith("unet.down_blocks")} == {0.8}
    assert {s for path, s in found.items() if path.startswith("text_encoder.")} == {0.4}
    assert {s for path, s in found.items() if path.startswith("text_encoder_2.")} == {0.0}
    assert b.strength == 0.7
    want = run(pipe)
    Network.of(pipe).merge()
    equal(run(pipe), want, run(sdxl()))
    Network.of(pipe).unmerge()

    with a.at_strength({"unet": 0.1}):
        assert {s.strength for path, _, s in a.adapters() if path.startswith("unet")} == {0.1}
        assert not torch.equal(run(pipe), want)
    assert {path: adapter.strength for path, _, adapter in a.adapters()} == found
    assert torch.equal(run(pipe), want)
    assert a.set_strength({"*": 2.0, "mid_block": 1.0}) == len(a)
    assert {path: s.strength for path, _, s in a.adapters()} == {
        path: 1.0 if ".mid_block." in path else 2.0 for path in found
    }


def test_wrong_strengths_are_told_and_change_nothing(tmp_path: Path) -> None:
    pipe = sd()
    network = adapted(pipe)
    nerine.save(network, tmp_path / "a.safetensors")
    with pytest.raises(TargetError, match=r"no adapted layer matches 'textencoder'.*'text_encoder'"):
        network.set_strength({"unet": 0.5, "textencoder": 0.4})
    with pytest.raises(OptionError, match="leave match out"):
        network.set_strength({"unet": 0.5}, "unet")
    with pytest.raises(OptionError, match="'unet': strength must be a finite number"):
        network.set_strength({"unet": float("nan")})
    assert network.strength == 1.0
    other = sd()
    with pytest.raises(TargetError, match="no adapted layer matches 'nothing'"):
        nerine.load(other, tmp_path / "a.safetensors", strength={"unet": 1.0, "nothing": 1.0})
    with pytest.raises(TargetError, match="has no adapters"):
        Network.of(other)


# -- whole models on disk --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PIPELINES)
def test_a_merged_pipeline_is_a_plain_one_on_disk(name: str, tmp_path: Path) -> None:
    make = PIPELINES[name]
    pipe = make()
    base = run(pipe)
    network = adapted(pipe)
    want = run(pipe)
    with pytest.raises(MergeError, match=r"save_pretrained: it has adapters that are not in its weights \(default\)"):
        pipe.save_pretrained(tmp_path / "refused")
    network.merge()
    pipe.save_pretrained(tmp_path / "merged", variant="fp16")
    network.unmerge()
    equal(run(pipe), want, base)
    network.merge(keep_original=False)
    network.detach()
    pipe.save_pretrained(tmp_path / "final")
    plain = {name: set(part.state_dict()) for name, part in make().components.items() if isinstance(part, nn.Module)}
    for folder, variant in (("merged", "fp16"), ("final", None)):
        for part, keys in plain.items():
            (file,) = (tmp_path / folder / part).glob("*.safetensors")
            with safetensors.safe_open(file, "pt") as tensors:
                assert set(tensors.keys()) <= keys  # T5 has one embedding under two names
        back = type(pipe).from_pretrained(tmp_path / folder, variant=variant)
        equal(run(back), want, base)


def test_switched_off_adapters_are_left_out_of_a_saved_model(tmp_path: Path) -> None:
    pipe = sd()
    network = adapted(pipe)
    network.off()
    pipe.unet.save_pretrained(tmp_path)
    back = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    assert {k: t.tolist() for k, t in back.state_dict().items()} == {
        k: t.tolist() for k, t in sd().unet.state_dict().items()
    }
    network.on()
    assert any(".nerine." in key for key in pipe.unet.state_dict())


# -- which parts -----------------------------------------------------------------------------------------------------
def test_what_is_no_pipeline_and_what_has_no_parts() -> None:
    with pytest.raises(OptionError, match=r"attach: expected a torch\.nn\.Module or a pipeline .*, got str"):
        nerine.attach("pipe", LoRA())  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"none of the parts that take adapters .*, only vae, tokenizer"):
        nerine.plan(SimpleNamespace(components={"vae": nn.Linear(2, 3), "tokenizer": None}), LoRA())
    planned = nerine.plan(sdxl(), LoRA(rank=2), targets="attn2")
    assert {row.layer.split(".")[0] for row in planned.rows} == {"unet"}


def test_the_controlnet_is_a_model_of_its_own() -> None:
    pipe = sd()
    pipe_like = SimpleNamespace(components={**pipe.components, "controlnet": pipe.unet, "vae": pipe.vae})
    assert set(nerine.attach(pipe_like, LoRA(rank=1), targets="attn1").model._modules) == {"unet", "text_encoder"}


def test_two_transformers_for_early_and_late_steps(tmp_path: Path) -> None:
    """Files of Wan 2.2 come in pairs with the same names: `component` says for which of the two."""

    def wan() -> Any:
        parts = {}
        for i, name in enumerate(["transformer", "transformer_2"]):
            torch.manual_seed(i)
            parts[name] = diffusers.WanTransformer3DModel(
                patch_size=(1, 2, 2),
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=10,
                freq_dim=16,
                ffn_dim=20,
                num_layers=2,
            )
        return SimpleNamespace(components={**parts, "vae": None})

    files = {}
    for i, part in enumerate(["transformer", "transformer_2"]):
        network = nerine.attach(wan().components[part], LoRA(rank=2, alpha=3), targets="attn1")
        stir(network.parameters(), seed=i)
        for dialect in ("diffusers", "comfy", "lycoris"):
            files[part, dialect] = tmp_path / f"{part}-{dialect}.safetensors"
            nerine.save(network, files[part, dialect], dialect=dialect)
    for (part, dialect), file in files.items():
        pipe = wan()
        loaded = nerine.load(pipe, file, component=part, strict=True)
        assert {path.split(".")[0] for path, *_ in loaded.adapters()} == {part}, (part, dialect)
        plain = nerine.load(wan(), file, strict=True)
        assert {path.split(".")[0] for path, *_ in plain.adapters()} == {"transformer"}
    pipe = wan()
    both = nerine.attach(pipe, LoRA(rank=2), targets="attn1")
    nerine.save(both, tmp_path / "both.safetensors")
    assert len(nerine.load(wan(), tmp_path / "both.safetensors", strict=True)) == len(both)
    with pytest.raises(
        FormatError, match=r"transformer\.blocks.* and transformer_2\.blocks.*save the parts .* one by one"
    ):
        nerine.save(both, tmp_path / "no.safetensors", dialect="diffusers")
    nerine.save(Network.of(pipe.components["transformer_2"]), tmp_path / "late.safetensors", dialect="diffusers")
