"""Optimisers by name, groups, rates and averages; and that each optimiser goes on from its state to the same bits."""

from __future__ import annotations

import importlib.util
import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nerine
from contract.cases import ONE_OF_EACH
from nerine.algorithms import Algorithm
from nerine.errors import OptionError, ShapeError
from nerine.train.ema import Ema
from nerine.train.optimizer import evaluating, groups_of, known_optimizers, make_optimizer, set_rate
from nerine.train.rates import Rates
from nerine.train.settings import OptimizerSettings

NAMES = ["adamw", "sgd", "adafactor", "radam", "prodigy", "schedulefree-adamw", "schedulefree-sgd", "adamw8bit"]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 5))


def adapted() -> tuple[nn.Module, nerine.Network]:
    base = model()
    return base, nerine.attach(base, nerine.LoRA(rank=3, alpha=2.0), generator=torch.Generator().manual_seed(1))


def settings(name: str = "adamw", **more: Any) -> OptimizerSettings:
    return OptimizerSettings(optimizer=name, **more)


def steps(base: nn.Module, optimizer: torch.optim.Optimizer, first: int, count: int) -> None:
    if hasattr(optimizer, "train"):
        optimizer.train()
    for step in range(first, first + count):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
        loss = (base(x) - x[:, :5]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def made(name: str, network: nerine.Network) -> torch.optim.Optimizer:
    more = {"optimizer_args": {"momentum": 0.9}} if name == "sgd" else {}
    own = settings(name, lr=1e-2, **more)
    return make_optimizer(own, groups_of(network, own, 1e-2))


@pytest.mark.parametrize("name", NAMES)
def test_a_state_leads_on_to_the_same_bits(name: str) -> None:
    if name == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    base, network = adapted()
    optimizer = made(name, network)
    steps(base, optimizer, 0, 4)
    buffer = io.BytesIO()
    torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    steps(base, optimizer, 4, 3)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other, again = adapted()
    second = made(name, again)
    again.load_state_dict(state["network"])
    second.load_state_dict(state["optimizer"])
    steps(other, second, 4, 3)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    assert any(p.abs().max() > 0 for n, p in network.named_parameters() if n.endswith("up"))


def test_every_optimizer_of_torch_has_a_name() -> None:
    known = known_optimizers()
    assert {"adamw", "sgd", "adafactor", "nadam"} <= set(known)
    assert "lbfgs" not in known


@pytest.mark.parametrize("name", ["AdamW", "adam-w", "ADAMW"])
def test_case_and_dashes_do_not_matter(name: str) -> None:
    _, network = adapted()
    assert type(made(name, network)) is torch.optim.AdamW


def test_mistakes_are_named() -> None:
    _, network = adapted()
    groups = groups_of(network, settings(), 1e-3)
    with pytest.raises(OptionError, match=r"there is no 'adamz'. Did you mean"):
        make_optimizer(settings("adamz"), groups)
    with pytest.raises(OptionError, match=r"AdamW has no 'weight_decy'. Did you mean 'weight_decay'"):
        make_optimizer(settings(optimizer_args={"weight_decy": 0.1}), groups)
    with pytest.raises(OptionError, match="optimizer sgd with"):
        make_optimizer(settings("sgd", optimizer_args={"momentum": -1.0}), groups)


def test_arguments_may_be_texts() -> None:
    _, network = adapted()
    given = {"betas": "0.8,0.9", "weight_decay": "0.05", "amsgrad": "true"}
    optimizer = make_optimizer(settings(optimizer_args=given), groups_of(network, settings(), 1e-3))
    group = optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"], group["amsgrad"]) == ((0.8, 0.9), 0.05, True)


def test_groups_have_the_rates_of_rules_encoders_and_carriers() -> None:
    parts = nn.ModuleDict({"unet": model(), "text_encoder": model()})
    rules = [nerine.Rule("unet.0", nerine.LoRA(rank=2), lr=5e-4), nerine.Rule("*", nerine.LoRA(rank=2))]
    network = nerine.attach(parts, rules)
    own = settings(lora_plus=4.0)
    groups = {group["lr"]: group["params"] for group in groups_of(network, own, 1e-3, 1e-4)}
    assert set(groups) == {5e-4, 2e-3, 1e-3, 4e-3, 1e-4, 4e-4}
    assert sum(map(len, groups.values())) == len(list(network.parameters()))
    ups = {id(p) for n, p in network.named_parameters() if n.endswith("up") and n.startswith("text_encoder")}
    assert {id(p) for p in groups[4e-4]} == ups


def test_layers_at_rate_zero_are_left_out() -> None:
    parts = nn.ModuleDict({"unet": model(), "text_encoder": model()})
    network = nerine.attach(parts, nerine.LoRA(rank=2))
    groups = groups_of(network, settings(), 1e-3, 0.0)
    assert sum(len(g["params"]) for g in groups) == 4
    with pytest.raises(OptionError, match="every learning rate is 0"):
        groups_of(network, settings(), 0.0, 0.0)


def test_rates_multiply_the_first() -> None:
    _, network = adapted()
    optimizer = make_optimizer(settings(), groups_of(network, settings(lora_plus=2.0), 1e-3))
    for factor in (0.5, 0.25, 1.0):
        set_rate(optimizer, factor)
        assert sorted(g["lr"] for g in optimizer.param_groups) == [1e-3 * factor, 2e-3 * factor]


def test_schedule_free_values_are_swapped_for_use() -> None:
    base, network = adapted()
    optimizer = made("schedulefree-adamw", network)
    steps(base, optimizer, 0, 5)
    before = [p.detach().clone() for p in network.parameters()]
    with evaluating(optimizer):
        used = [p.detach().clone() for p in network.parameters()]
    after = list(network.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, used, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# -- rates -------------------------------------------------------------------------------------------------------------
SCHEDULES = ["constant", "linear", "cosine", "cosine-restarts", "polynomial"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("warmup", "count"), [(0.1, 10), (7, 7), (0, 0)])
def test_rates_rise_and_fall(schedule: str, warmup: float, count: int) -> None:
    rates = Rates(OptimizerSettings(schedule=schedule, warmup=warmup, end_lr=0.1, schedule_cycles=3), 100)
    found = [rates(step) for step in range(100)]
    assert rates.warmup == count
    assert all(a < b for a, b in pairwise(found[:count]))
    assert all(0 < rate <= 1 for rate in found)
    assert found[count] == 1.0
    if schedule == "constant":
        assert set(found[count:]) == {1.0}
    elif schedule != "cosine-restarts":
        assert all(a > b for a, b in pairwise(found[count:]))
        assert rates(100) == pytest.approx(0.1)
    else:
        assert sum(rate > 0.99 for rate in found) >= 3
        assert sum(b > a + 0.5 for a, b in pairwise(found[count:])) == 2


def test_cosine_and_polynomial_by_hand() -> None:
    assert Rates(OptimizerSettings(schedule="cosine", warmup=0), 100)(50) == pytest.approx(0.5)
    assert Rates(OptimizerSettings(schedule="polynomial", schedule_power=2.0, warmup=0), 100)(50) == pytest.approx(0.25)


# -- averages ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", ONE_OF_EACH, ids=str)
def test_averages_follow_by_hand_and_go_away(algorithm: Algorithm) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.Conv2d(6, 8, 1))
    network = nerine.attach(base, algorithm, targets="*")
    ema = Ema(network, 0.7)
    expected = {name: p.detach().clone() for name, p in network.named_parameters()}
    for step in range(30):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn(p.shape))
        keep = min(0.7, (1 + step) / (10 + step))
        expected = {n: keep * expected[n] + (1 - keep) * p.detach() for n, p in network.named_parameters()}
        ema.update(step)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    with ema.swapped():
        for name, p in network.named_parameters():
            assert torch.allclose(p, expected[name], atol=1e-5), name
            assert not torch.equal(p, before[name])
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


def test_averages_are_given_back_after_an_error() -> None:
    _, network = adapted()
    ema = Ema(network, 0.5)
    with torch.no_grad():
        next(network.parameters()).add_(1)
    before = [p.detach().clone() for p in network.parameters()]

    def fail() -> None:
        with ema.swapped():
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_averages_of_another_network_are_refused(tmp_path: Path) -> None:
    _, network = adapted()
    ema = Ema(network, 0.5)
    state = ema.state_dict()
    state.pop(next(iter(state)))
    with pytest.raises(ShapeError, match="another network"):
        ema.load_state_dict(state)
