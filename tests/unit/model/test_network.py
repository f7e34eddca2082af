"""The handle: parameters, states, strengths, and refusals that leave the model untouched."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import nerine
from nerine import DoRA, LoKr, LoRA, MergeError, OptionError, ShapeError, TargetError
from nerine.model.adapter import Noise


def model_of() -> nn.Module:
    torch.manual_seed(1)
    return nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Sequential(nn.Linear(4, 6), nn.Conv1d(6, 2, 3))})


def stirred(model: nn.Module, **options: Any) -> nerine.Network:
    network = nerine.attach(model, DoRA(LoRA(rank=2, alpha=1.0)), **options)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return network


def test_names_and_groups() -> None:
    network = stirred(model_of())
    names = [n for n, _ in network.named_parameters()]
    assert names == [f"{p}.{t}" for p in ("a", "b.0", "b.1") for t in ("magnitude", "down", "up")]
    assert len(network) == 3
    assert repr(network).startswith("Network(default: 3 adapters, ")
    groups = network.param_groups(1e-4, lora_plus=16)
    ups = {id(p) for n, p in network.named_parameters() if n.endswith("up")}
    assert {g["lr"]: {id(p) for p in g["params"]} == ups for g in groups} == {1e-4: False, 16e-4: True}
    assert sum(len(g["params"]) for g in groups) == len(names)
    torch.optim.AdamW(groups)


def test_lora_plus_reaches_every_algorithm() -> None:
    network = nerine.attach(model_of(), LoKr(rank=1))
    assert {g["lr"] for g in network.param_groups(1.0, lora_plus=4)} == {1.0, 4.0}


def test_state_round_trip() -> None:
    first, second = stirred(model_of()), stirred(model_of())
    state = first.state_dict()
    assert all(not t.requires_grad and t.is_leaf for t in state.values())
    second.load_state_dict(state)
    assert all(torch.equal(t, state[k]) for k, t in second.state_dict().items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("a.up"), "1 keys differ, for example a.up"),
        (lambda s: s.update({"c.up": torch.ones(1)}), "1 keys differ, for example c.up"),
        (lambda s: s.update({"a.up": torch.ones(4, 3)}), r"a.up: expected shape \(4, 2\), got \(4, 3\)"),
    ],
)
def test_a_wrong_state_changes_nothing(change: Any, words: str) -> None:
    network = stirred(model_of())
    before = {k: t.clone() for k, t in network.state_dict().items()}
    state = {k: torch.zeros_like(t) for k, t in before.items()}
    change(state)
    with pytest.raises(ShapeError, match=words):
        network.load_state_dict(state)
    assert all(torch.equal(t, before[k]) for k, t in network.state_dict().items())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", None, True])
def test_strength_is_a_finite_number(value: Any) -> None:
    network = stirred(model_of())
    with pytest.raises(OptionError, match="strength must be a finite number"):
        network.strength = value


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", None])
def test_strength_of_a_rule_is_a_finite_number(value: Any) -> None:
    with pytest.raises(OptionError):
        nerine.attach(model_of(), [nerine.Rule("a", LoRA(rank=2), strength=value)])


def test_strength_by_layer() -> None:
    network = stirred(model_of())
    assert network.strength == 1
    assert network.set_strength(0.5, "b") == 2
    with pytest.raises(OptionError, match=r"different strengths \(\[0.5, 1.0\]\)"):
        _ = network.strength
    with pytest.raises(TargetError, match="no adapted layer matches 'c'"):
        network.set_strength(0.5, "c")
    network.strength = 2
    assert network.strength == 2


@pytest.mark.parametrize("name", ["", "a.b", "keys", "forward", "training", "update", None, 3])
def test_names_that_cannot_be(name: Any) -> None:
    model = model_of()
    with pytest.raises(OptionError, match="cannot be the name of an adapter"):
        nerine.attach(model, LoRA(rank=2), name=name)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, math.nan, "0.1", None, True])
@pytest.mark.parametrize("kind", ["dropout", "rank_dropout", "module_dropout"])
def test_noise_is_a_probability(kind: str, value: Any) -> None:
    model = model_of()
    with pytest.raises(OptionError, match=rf"{kind} must be a probability in \[0, 1\)"):
        nerine.attach(model, LoRA(rank=2), **{kind: value})
    assert list(model.state_dict()) == list(model_of().state_dict())


def test_noise_takes_no_other() -> None:
    with pytest.raises(TypeError):
        Noise(input_dropout=0.1)  # type: ignore[call-arg]


def test_of_and_names() -> None:
    model = model_of()
    with pytest.raises(TargetError, match="ModuleDict has no adapters"):
        nerine.Network.of(model)
    stirred(model, name="style")
    stirred(model, name="person")
    both = nerine.Network.of(model)
    assert both["style"].names == ("style",)
    with pytest.raises(TargetError, match=r"no adapter called 'stile'\. Did you mean 'style'"):
        both["stile"]


def test_attach_draws_from_the_generator_it_is_given() -> None:
    states = []
    for seed in (1, 1, 2):
        network = nerine.attach(model_of(), LoRA(rank=2), generator=torch.Generator().manual_seed(seed))
        states.append(network.state_dict()["a.down"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


# -- merging ---------------------------------------------------------------------------------------------------------
def test_merging_twice_is_refused() -> None:
    model = model_of()
    network = stirred(model)
    network.merge()
    weight = model["a"].weight.detach().clone()
    with pytest.raises(MergeError, match="default is merged already; unmerge before merging again"):
        network.merge()
    with pytest.raises(MergeError, match="default is merged already"):
        nerine.Network.of(model).merge()
    assert torch.equal(model["a"].weight, weight)


def test_merging_under_another_adapter_is_refused_and_changes_nothing() -> None:
    model = model_of()
    first = stirred(model, name="first")
    before = {k: t.clone() for k, t in model.state_dict().items()}
    second = nerine.attach(model, LoRA(rank=1), targets=nn.Conv1d, name="second")
    with pytest.raises(MergeError, match=r"b\.1: second is applied to the weight that would change under it"):
        first.merge()
    assert not first.is_merged
    assert all(torch.equal(model.state_dict()[k], t) for k, t in before.items())
    second.off()
    first.merge()
    assert first.is_merged
    first.unmerge()
    assert all(torch.equal(model.state_dict()[k], t) for k, t in before.items())


def test_an_adapter_put_on_a_merged_layer_cannot_be_merged_into_it_unseen() -> None:
    model = model_of()
    first = stirred(model, name="first")
    first.merge()
    second = stirred(model, name="second")
    with pytest.raises(MergeError, match="first is merged already"):
        second.merge()


@pytest.mark.parametrize(
    "act",
    [
        lambda n: setattr(n, "strength", 0.5),
        lambda n: n.set_strength(0.5, "a"),
        lambda n: n.off(),
        lambda n: n.load_state_dict(n.state_dict()),
        lambda n: n.paused().__enter__(),
    ],
)
def test_while_merged_what_would_have_no_effect_is_refused(act: Any) -> None:
    network = stirred(model_of())
    network.merge()
    with pytest.raises(MergeError, match="merged into the weights: unmerge first"):
        act(network)


def test_merged_for_good_cannot_be_unmerged() -> None:
    model = model_of()
    network = stirred(model)
    network.merge(keep_original=False)
    weight = model["a"].weight.detach().clone()
    with pytest.raises(MergeError, match="merged with keep_original=False, so the original bits are gone"):
        network.unmerge()
    network.detach()
    assert torch.equal(model["a"].weight, weight)


def test_unmerging_what_is_not_merged_is_refused() -> None:
    model = model_of()
    weight = model["a"].weight.detach().clone()
    with pytest.raises(MergeError, match="default is not merged"):
        stirred(model).unmerge()
    assert torch.equal(model["a"].weight, weight)


def test_a_merge_that_overflows_is_refused_and_undone() -> None:
    model = model_of().half()
    network = stirred(model)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with torch.no_grad():
        dict(network.named_parameters())["b.1.magnitude"].fill_(1e9)
    with pytest.raises(MergeError, match=r"b\.1: the merged weight is not finite in torch.float16"):
        network.merge()
    assert torch.equal(model["a"].weight, before["a.weight"])
    assert not network.is_merged


def test_the_report_says_how_much_was_rounded() -> None:
    report = stirred(model_of().bfloat16()).merge()
    assert [row[0] for row in report.rows] == ["a", "b.0", "b.1"]
    assert 0 < report.largest < 0.01
    assert report.to_dict()["largest"] == report.largest
    assert "largest rounding" in str(report)


def test_a_part_switched_off_is_not_merged() -> None:
    model = model_of()
    first, second = stirred(model, name="first"), stirred(model, name="second")
    x = torch.randn(2, 6)
    second.off()
    want = model["a"](x)
    nerine.Network.of(model).merge()
    torch.testing.assert_close(model["a"](x), want)
    assert first.is_merged
    assert not second.is_merged


def test_training_goes_on_after_unmerging() -> None:
    model = model_of()
    network = stirred(model)
    network.merge()
    model["a"](torch.randn(2, 6)).sum()
    network.unmerge()
    model["a"](torch.randn(2, 6)).sum().backward()
    assert all(p.grad is not None for n, p in network.named_parameters() if n.startswith("a."))
