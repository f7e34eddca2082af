"""Pipelines and wrappers, without the packages that have them: what is a part, and what a layer is called."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nerine
from nerine import LoRA, MergeError, Network, OptionError, TargetError
from nerine.model.pipeline import Parts, as_model, named_layers
from nerine.model.strengths import strengths_at


class Part(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(width, 10), nn.Linear(10, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.to_out(self.to_q(x).tanh())
        return out

    def save_pretrained(self, folder: Path, variant: str = "", state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the keys of the state, as transformers' models write its tensors."""
        Path(folder).write_text(json.dumps([variant, *(state_dict or self.state_dict())]))


def pipe_of(**parts: Any) -> Any:
    torch.manual_seed(0)
    known = {"unet": Part(), "text_encoder": Part(8), "vae": Part(), "tokenizer": object(), "safety_checker": None}
    return SimpleNamespace(components={**known, **parts})


def stirred(network: Network) -> Network:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return network


X = torch.linspace(-1, 1, 18).reshape(3, 6)


def test_a_module_is_itself_and_a_pipeline_its_parts() -> None:
    part, pipe = Part(), pipe_of(transformer_2=Part(), controlnet=Part())
    assert as_model(part, "load") is part
    view = as_model(pipe, "load")
    assert isinstance(view, Parts)
    assert list(view) == ["unet", "text_encoder", "transformer_2"]
    assert view["unet"] is pipe.components["unet"]


def test_the_view_is_not_kept_alive_and_not_needed() -> None:
    pipe = pipe_of()
    network = stirred(nerine.attach(pipe, LoRA(rank=2, alpha=3)))
    want, view = pipe.components["unet"](X), weakref.ref(network.model)
    assert {a.context.model() for path, _, a in network.adapters() if path.startswith("unet")} == {
        pipe.components["unet"]
    }
    del network
    gc.collect()
    assert view() is None
    assert torch.equal(pipe.components["unet"](X), want)
    again = Network.of(pipe)
    assert len(again) == 4
    assert all(a.context.model() is not None for *_, a in again.adapters())
    again.detach()
    with pytest.raises(TargetError, match="Parts has no adapters"):
        Network.of(pipe)


def test_timesteps_reach_every_part() -> None:
    network = nerine.attach(pipe_of(), LoRA(rank=2))
    network.set_timestep(7)
    assert {float(a.context.timestep) for *_, a in network.adapters()} == {7.0}


def test_a_path_is_that_in_the_model_at_hand() -> None:
    pipe = pipe_of()
    inner = nerine.attach(pipe.components["unet"], LoRA(rank=2), name="inner")
    outer = nerine.attach(pipe, LoRA(rank=1), name="outer", targets="to_q")
    assert [path for path, *_ in inner.adapters()] == ["to_q", "to_out"]
    assert [path for path, *_ in outer.adapters()] == ["unet.to_q", "text_encoder.to_q"]
    assert [row[0] for row in outer.report.rows] == ["unet.to_q", "text_encoder.to_q"]
    assert [path for path, *_ in Network.of(pipe)["inner"].adapters()] == ["unet.to_q", "unet.to_out"]
    assert [name for name, _ in Network.of(pipe.components["unet"])["outer"].named_parameters()] == [
        "to_q.down",
        "to_q.up",
    ]
    assert inner.set_strength(0.5, "to_q") == outer.set_strength(0.5, "unet.to_q") == 1
    assert [row[0] for row in Network.of(pipe).merge().rows] == ["unet.to_q", "unet.to_out", "text_encoder.to_q"]


class Fused(nn.Module):
    """Rows, experts and attention: layers whose path is not that of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.attn = nn.Linear(6, 12), nn.MultiheadAttention(6, 2)
        self.experts = nn.Parameter(torch.randn(3, 4, 6))


def test_and_so_is_that_of_rows_attention_and_parameters() -> None:
    module = Fused()
    rules = [
        nerine.Rule("qkv", LoRA(rank=1), rows=(0, 4)),
        nerine.Rule("qkv", LoRA(rank=1), rows=(8, 12)),
        nerine.Rule("re:attn.*|experts", LoRA(rank=1)),
    ]
    inner = nerine.attach(module, rules, targets=["qkv", "attn", "experts"])
    paths = [path for path, *_ in inner.adapters()]
    assert sorted(paths) == ["attn.in_proj_weight", "attn.out_proj", "experts", "qkv[0:4]", "qkv[8:12]"]
    outer = Network.of(pipe_of(unet=module))
    assert [path for path, *_ in outer.adapters()] == [f"unet.{path}" for path in paths]


# -- wrappers --------------------------------------------------------------------------------------------------------
class Tuned(nn.Module):
    """A layer as PEFT wraps it."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = nn.Linear(6, 2), nn.Linear(2, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x))
        return out


def test_wrappers_leave_no_trace_in_paths() -> None:
    part = Part()
    part.to_q = Tuned(part.to_q)  # type: ignore[assignment]
    wrapped = pipe_of(unet=torch.compile(part, backend="eager"))
    assert [p for p, _ in named_layers(as_model(wrapped, "load"))][:4] == ["", "unet", "unet.to_q", "unet.to_out"]
    assert dict(named_layers(part))["to_q"] is part.to_q.base_layer
    before = part(X)
    network = stirred(nerine.attach(part, LoRA(rank=2)))
    assert [path for path, *_ in network.adapters()] == ["to_q", "to_out"]
    assert not torch.allclose(part(X), before, atol=1e-2)
    with pytest.raises(TargetError, match="no layer of Part matches 'lora_A'"):
        nerine.plan(part, LoRA(), targets="lora_A")
    network.detach()
    assert torch.equal(part(X), before)


def test_a_layer_that_has_a_base_layer_of_its_own_is_not_taken_for_one() -> None:
    part = Part()
    part.add_module("base_layer", nn.Linear(6, 4))
    assert [path for path, _ in named_layers(part)] == ["", "to_q", "to_out", "base_layer"]


# -- strengths -------------------------------------------------------------------------------------------------------
def test_the_last_pattern_that_matches_counts() -> None:
    layers = [
        ("unet.up.to_q", nn.Linear(2, 3)),
        ("unet.down.to_q", nn.Linear(2, 3)),
        ("text_encoder.fc", nn.Conv1d(2, 3, 1)),
    ]
    top = nn.Module()
    assert strengths_at(0.5, layers, top) == [0.5] * 3
    assert strengths_at({"unet": 0.8, "up": 2}, layers, top) == [2.0, 0.8, None]
    assert strengths_at({"up": 2, "unet": 0.8}, layers, top) == [0.8, 0.8, None]
    assert strengths_at({nn.Linear: 0.1, lambda path, _: path.endswith("fc"): 0.3}, layers, top) == [
        0.1,
        0.1,
        0.3,
    ]
    assert strengths_at({}, layers, top) == [None] * 3
    with pytest.raises(OptionError, match="expected a pattern, a class or a predicate as key, got 3"):
        strengths_at({3: 0.5}, layers, top)  # type: ignore[dict-item]
    with pytest.raises(OptionError, match="strength must be a finite number, got '1'"):
        strengths_at("1", layers, top)  # type: ignore[arg-type]


def test_another_strength_for_a_while() -> None:
    part = Part()
    network = stirred(nerine.attach(part, LoRA(rank=2)))
    network.set_strength(0.3, "to_q")
    before = part(X)
    with pytest.raises(RuntimeError, match="stop"), network.at_strength(2.0, "to_out"):  # noqa: PT012
        assert [a.strength for *_, a in network.adapters()] == [0.3, 2.0]
        assert not torch.equal(part(X), before)
        raise RuntimeError("stop")
    assert [a.strength for *_, a in network.adapters()] == [0.3, 1.0]
    assert torch.equal(part(X), before)


# -- saving the model itself -----------------------------------------------------------------------------------------
def test_saving_an_adapted_model(tmp_path: Path) -> None:
    part, file = Part(), tmp_path / "keys.json"
    plain = list(part.state_dict())
    first = stirred(nerine.attach(part, LoRA(rank=2), targets="to_q", name="first"))
    second = stirred(nerine.attach(part, LoRA(rank=2), targets="to_out", name="second"))
    for copied in (part, copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        with pytest.raises(
            MergeError, match=r"Part\.save_pretrained: it has adapters .*\(first, second\).*nerine\.save"
        ):
            copied.save_pretrained(file)
    part.save_pretrained(file, state_dict=part.state_dict())  # whoever says what to write is left alone
    assert len(json.loads(file.read_text())) == 1 + len(part.state_dict())
    first.merge()
    with pytest.raises(MergeError, match=r"\(second\)"):
        part.save_pretrained(file)
    second.off()
    part.save_pretrained(file, variant="fp16")
    assert json.loads(file.read_text()) == ["fp16", *plain]
    assert any(".nerine." in key for key in part.state_dict())
    second.on()
    second.strength = 0
    part.save_pretrained(file)
    second.detach()
    assert "save_pretrained" in part.__dict__
    first.unmerge()
    first.detach()
    assert "save_pretrained" not in part.__dict__
    part.save_pretrained(file)
    assert json.loads(file.read_text()) == ["", *plain]


def test_the_adapters_of_a_host_are_its_own_to_save(tmp_path: Path) -> None:
    part = Part()
    nerine.attach(part, LoRA(rank=2), own=False)
    part.save_pretrained(tmp_path / "keys.json")
    assert "save_pretrained" not in part.__dict__


# -- merges that others build on -------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_weight_that_was_changed_after_the_merge_is_not_overwritten(dtype: torch.dtype) -> None:
    part = Part().to(dtype)
    network = stirred(nerine.attach(part, LoRA(rank=2)))
    start = part.to_out.weight.clone()
    network.merge()
    network.unmerge()
    assert torch.equal(part.to_out.weight, start)
    network.merge()
    part.to_out.weight.data[3, 1] += 0.5  # as PEFT does, past autograd's count of changes
    changed = part.to_out.weight.clone()
    for act in (network.unmerge, network.detach):
        with pytest.raises(MergeError, match=r"to_out: its weight was changed after the merge.*keep_original=False"):
            act()
    assert network.is_merged
    part.to_out.weight.data[3, 1] = (changed[3, 1].double() - 0.5).to(dtype)
    network.merge(keep_original=False)
    with pytest.raises(MergeError, match="the original bits are gone"):
        network.unmerge()
    part.to_out.weight.data.copy_(changed)
    network.detach()
    assert torch.equal(part.to_out.weight, changed)
