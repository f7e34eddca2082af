"""Chance in training: what is dropped, how often, and that on average nothing is lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import nerine
from contract.cases import ALGORITHMS, ONE_OF_EACH, PLACES, Place, few
from nerine.algorithms import REGISTRY, Algorithm, DoRA
from nerine.model.adapter import Adapter
from nerine.testing.battery import input_at, is_random, layer_at, path_of, stir
from nerine.testing.places import site_at

pytestmark = pytest.mark.no_device_guard  # one device only, and many small operations

LINEAR = next(p for p in PLACES if p.name == "linear")
# DoRA's norm makes the deviation bend in the factors, so that only what is linear keeps its mean
CALM = [a for a in ONE_OF_EACH if not is_random(a) and not a.unsuited(site_at(LINEAR))]
STRAIGHT = [a for a in ALGORITHMS if not isinstance(a, DoRA) and a.keeps_mean and not is_random(a)]
STRAIGHT = [a for a in STRAIGHT if not a.unsuited(site_at(LINEAR))]
ONE_RANK = [a for a in ALGORITHMS if getattr(getattr(a, "inner", a), "rank", 0) == 1]


def noisy(algorithm: Algorithm, place: Place, **noise: float) -> tuple[nn.Sequential, Adapter, Tensor, Tensor]:
    """A model in training, its adapter, an input, and the deviation without chance."""
    model = nn.Sequential(layer_at(place))
    network = nerine.attach(model, algorithm, targets=nn.Module, **noise)
    stir(network)
    ((_, _, adapter),) = network.adapters()
    x = input_at(place)
    with torch.no_grad():
        calm = model.eval()(x) - layer_at(place)(x)
    model.train()
    return model, adapter, x, calm


@torch.no_grad()
def draws(model: nn.Module, place: Place, x: Tensor, count: int) -> Tensor:
    """`count` deviations `[count, ...]`."""
    base = layer_at(place)(x)
    return torch.stack([model(x) for _ in range(count)]) - base


def assert_mean(found: Tensor, want: Tensor) -> None:
    """The mean of the draws is `want` within what their number allows (5 sigma)."""
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - want).abs() <= 5 * error + 1e-9).all()


@pytest.mark.parametrize("through_weight", [False, True], ids=["factored", "weight"])
@pytest.mark.parametrize("algorithm", STRAIGHT, ids=str)
def test_rank_dropout_keeps_the_mean(algorithm: Algorithm, through_weight: bool) -> None:
    model, adapter, x, calm = noisy(algorithm, LINEAR, rank_dropout=0.4)
    with path_of(adapter, through_weight):
        found = draws(model, LINEAR, x, 300)
    assert found.std(0).max() > 0, "nothing was dropped"
    assert_mean(found, calm)


@pytest.mark.parametrize(
    "algorithm", [a for a in ALGORITHMS if getattr(getattr(a, "inner", a), "rank", 9) == 1], ids=str
)
def test_rank_dropout_of_the_only_rank_is_finite(algorithm: Algorithm) -> None:
    for place in few(algorithm):
        model, _, x, _ = noisy(algorithm, place, rank_dropout=0.9)
        for _ in range(30):
            x.grad = None
            model.zero_grad()
            y = model(x if place.tokens else x.requires_grad_())
            y.sum().backward()
            found = [
                y,
                *([] if place.tokens else [x.grad]),
                *(p.grad for p in model.parameters() if p.grad is not None),
            ]
            assert all(torch.isfinite(t).all() for t in found)


@pytest.mark.parametrize("algorithm", CALM, ids=str)
def test_dropout_keeps_the_mean(algorithm: Algorithm) -> None:
    model, _, x, calm = noisy(algorithm, LINEAR, dropout=0.4)
    found = draws(model, LINEAR, x, 300)
    assert_mean(found, calm)
    kept = found.abs() > 1e-12
    assert 0.55 < kept.double().mean() < 0.65
    torch.testing.assert_close(found[kept], (calm / 0.6).expand_as(found)[kept], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("through_weight", [False, True], ids=["factored", "weight"])
@pytest.mark.parametrize("algorithm", CALM, ids=str)
def test_module_dropout_leaves_out_the_whole_adapter(algorithm: Algorithm, through_weight: bool) -> None:
    model, adapter, x, calm = noisy(algorithm, LINEAR, module_dropout=0.3)
    with path_of(adapter, through_weight):
        found = draws(model, LINEAR, x, 400)
    out = (found == 0).flatten(1).all(1)
    assert 0.22 < out.double().mean() < 0.38
    torch.testing.assert_close(found[~out], calm.expand_as(found[~out]), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("algorithm", CALM, ids=str)
def test_module_dropout_with_strength(algorithm: Algorithm) -> None:
    model, adapter, x, calm = noisy(algorithm, LINEAR, module_dropout=0.5)
    adapter.strength = -0.5
    found = draws(model, LINEAR, x, 30)
    out = (found == 0).flatten(1).all(1)
    torch.testing.assert_close(found[~out], -0.5 * calm.expand_as(found[~out]), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("algorithm", CALM, ids=str)
def test_nothing_is_dropped_in_eval_or_merged(algorithm: Algorithm) -> None:
    model, _, x, calm = noisy(algorithm, LINEAR, dropout=0.9, rank_dropout=0.9, module_dropout=0.9)
    found = draws(model.eval(), LINEAR, x, 3)
    torch.testing.assert_close(found, calm.expand_as(found), rtol=1e-10, atol=1e-12)
    model.train()
    nerine.Network.of(model).merge()
    found = draws(model, LINEAR, x, 3)
    torch.testing.assert_close(found, calm.expand_as(found), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("algorithm", CALM, ids=str)
def test_the_same_seed_drops_the_same(algorithm: Algorithm) -> None:
    """Rank dropout and module dropout are drawn alike on both paths."""
    model, adapter, x, _ = noisy(algorithm, LINEAR, rank_dropout=0.5, module_dropout=0.5)
    found = []
    for through_weight in (False, True):
        with path_of(adapter, through_weight):
            torch.manual_seed(7)
            found.append(draws(model, LINEAR, x, 20))
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-9)


def test_dora_sees_the_dropped_ranks_in_its_norm() -> None:
    """With every rank dropped DoRA gives m/|W|, not a stale norm."""
    model, _, x, _ = noisy(DoRA(REGISTRY["lora"](rank=1, alpha=2.0)), LINEAR, rank_dropout=0.5)
    layer = model[0]
    magnitude = layer.nerine.default.magnitude
    want = layer_at(LINEAR)
    want.weight.mul_(magnitude.detach() / want.weight.norm(dim=1, keepdim=True))
    found = draws(model, LINEAR, x, 20)
    assert any(torch.allclose(d, want(x) - layer_at(LINEAR)(x), atol=1e-10) for d in found)
