"""While nothing changes, what depends on the tensors alone is worked out once, and gives the same bits."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import nerine
import one_layer
from nerine.algorithms import Algorithm
from nerine.model.mount import mounts_of
from nerine.model.network import Network
from one_layer import draw

INNER: tuple[Algorithm, ...] = (
    nerine.LoRA(rank=3, alpha=2),
    nerine.LoHa(rank=2, alpha=1),
    nerine.LoKr(factor=2, rank=1),
    nerine.GLoRA(rank=2, alpha=1),
    nerine.TLoRA(rank=3),
    nerine.IA3(),
    nerine.DiagOFT(block_size=4),
    nerine.BOFT(block_size=4, rescale=True),
    nerine.OFTv2(block_size=4),
    nerine.Full(),
)
ALL = (*INNER, *map(nerine.DoRA, INNER), nerine.DoRA(nerine.LoRA(rank=3), axis="in"))


def made(algorithm: Algorithm) -> tuple[nn.Module, Network]:
    model, network = one_layer.made(algorithm)
    return model.eval(), network


def memo_of(model: nn.Module) -> dict[str, Any]:
    (mount,) = mounts_of(model[0])  # type: ignore[index]
    assert mount.kept is not None
    return mount.kept.memo


@pytest.mark.parametrize("algorithm", ALL, ids=str)
@torch.no_grad()
def test_small_things_give_the_same_bits(algorithm: Algorithm) -> None:
    model, network = made(algorithm)
    x = draw(5, 24)
    want = model(x)
    with network.cached():
        assert torch.equal(model(x), want)
        assert torch.equal(model(x), want), "the second call takes what the first has kept"
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("algorithm", ALL, ids=str)
@torch.no_grad()
def test_weights_are_kept_in_full_precision(algorithm: Algorithm) -> None:
    model, network = made(algorithm)
    x = draw(5, 24)
    want = model(x)
    with network.cached(weights=True):
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
        assert any(name.startswith("weight") for name in memo_of(model))
        network.strength = 0.5
        half = model(x)
    torch.testing.assert_close(model(x), half, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_half_precision_keeps_no_weights() -> None:
    """In which small deviations would be lost."""
    model, network = made(nerine.DoRA(nerine.LoRA(rank=3)))
    model.bfloat16()
    x = draw(5, 24).bfloat16()
    want = model(x)
    with network.cached(weights=True):
        assert torch.equal(model(x), want)
        assert torch.equal(model(x), want)
        assert "norm" in memo_of(model)
        assert not any(name.startswith("weight") for name in memo_of(model))


@torch.no_grad()
def test_nothing_is_worked_out_twice() -> None:
    model, network = made(nerine.DoRA(nerine.DiagOFT(block_size=4)))
    x = draw(5, 24)
    with network.cached(), mock.patch("torch.linalg.solve_ex", wraps=torch.linalg.solve_ex) as solve:
        model(x), model(x)
        before = solve.call_count
        model(x)
        assert before > 0
        assert solve.call_count == before


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("which", ["adapter", "weight"])
@torch.no_grad()
def test_changes_in_place_are_noticed(which: str, weights: bool) -> None:
    model, network = made(nerine.DoRA(nerine.LoRA(rank=3)))
    x = draw(5, 24)
    with network.cached(weights=weights):
        first = model(x)
        (next(network.parameters()) if which == "adapter" else model[0].weight).mul_(2)  # type: ignore[index]
        second = model(x)
    assert not torch.allclose(first, second, atol=1e-3)
    torch.testing.assert_close(second, model(x), rtol=1e-4, atol=1e-5)


def test_training_is_not_touched() -> None:
    model, network = made(nerine.DoRA(nerine.LoRA(rank=3)))
    x = draw(5, 24)
    with network.cached():
        model(x).square().sum().backward()
        assert not memo_of(model)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_in_inference_mode() -> None:
    model, network = made(nerine.DoRA(nerine.LoRA(rank=3)))
    with network.cached(), torch.inference_mode():
        x = draw(5, 24)
        assert torch.equal(model(x), model(x))
