"""The short way through a layer gives the bits of the long one, and closes whenever something has changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nerine
from nerine.algorithms import Algorithm
from nerine.model.lane import Lane
from nerine.model.mount import mounts_of
from nerine.model.network import Network
from one_layer import draw, made

ALGORITHMS: tuple[Algorithm, ...] = (
    nerine.LoRA(rank=3, alpha=2),
    nerine.LoHa(rank=2, alpha=1),
    nerine.LoKr(factor=2, full_matrix=True),
    nerine.LoKr(factor=2, rank=1),
    nerine.GLoRA(rank=2, alpha=1),
    nerine.TLoRA(rank=3),
    nerine.DyLoRA(rank=4),
    nerine.IA3(),
    nerine.IA3(on_input=True),
    nerine.DiagOFT(block_size=4),
    nerine.DiagOFT(block_size=4, rescale=True),
    nerine.BOFT(block_size=4),
    nerine.OFTv2(block_size=4),
    nerine.Full(),
)
ALL = (*ALGORITHMS, *map(nerine.DoRA, ALGORITHMS), nerine.DoRA(nerine.LoRA(rank=3), axis="in"))


def lane_of(model: nn.Module) -> Lane | None:
    (mount,) = mounts_of(model[0])  # type: ignore[index]
    lane: Lane | None = mount.lane
    return lane


def long_way(model: nn.Module, x: Tensor) -> Tensor:
    (mount,) = mounts_of(model[0])  # type: ignore[index]
    mount.lane = None
    found: Tensor = model(x)
    return found


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("algorithm", ALL, ids=str)
def test_both_ways_give_the_same_bits(algorithm: Algorithm, strength: float) -> None:
    model, network = made(algorithm)
    network.strength = strength
    model.eval() if "DyLoRA" in str(algorithm) else model.train()
    found = []
    x = draw(5, 24).requires_grad_()
    for way in (long_way, lambda model, x: model(x)):
        x.grad = None
        for p in network.parameters():
            p.grad = None
        y = way(model, x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in network.parameters())])
        assert lane_of(model) is not None
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@pytest.mark.parametrize("layer", [nn.Conv2d(24, 16, 3, padding=1), nn.ConvTranspose2d(24, 16, 3, stride=2)], ids=str)
@pytest.mark.parametrize("algorithm", [nerine.LoRA(rank=3), nerine.DoRA(nerine.LoKr(factor=2))], ids=str)
def test_convolutions(algorithm: Algorithm, layer: nn.Module) -> None:
    model, _ = made(algorithm, copy.deepcopy(layer))
    x = draw(2, 24, 6, 5)
    first = long_way(model, x)
    assert lane_of(model) is not None
    assert torch.equal(first, model(x))


def weight_of(model: nn.Module) -> nn.Parameter:
    layer: Any = model[0]  # type: ignore[index]
    weight: nn.Parameter = layer.weight
    return weight


def change_values(model: nn.Module, network: Network) -> None:
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.5)


def change_data(model: nn.Module, network: Network) -> None:
    for p in network.parameters():
        p.data.mul_(1.5)


def change_base(model: nn.Module, network: Network) -> None:
    weight_of(model).data.mul_(1.5)


def change_base_parameter(model: nn.Module, network: Network) -> None:
    model[0].weight = nn.Parameter(weight_of(model) * 2, requires_grad=False)  # type: ignore[index]


def change_bias(model: nn.Module, network: Network) -> None:
    model[0].bias = None  # type: ignore[index]


def switch_off(model: nn.Module, network: Network) -> None:
    network.off()


def set_strength(model: nn.Module, network: Network) -> None:
    network.strength = 0.5


def merge(model: nn.Module, network: Network) -> None:
    network.merge()


def detach(model: nn.Module, network: Network) -> None:
    network.detach()


def add_another(model: nn.Module, network: Network) -> None:
    _, other = network, nerine.attach(model, nerine.IA3(), name="other")
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.25)


def add_another_of_a_host(model: nn.Module, network: Network) -> None:
    other = nerine.attach(model, nerine.IA3(), name="other", own=False)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.25)


def take_values(model: nn.Module, network: Network) -> None:
    network.load_state_dict({key: t * 2 for key, t in network.state_dict().items()})


CHANGES = (
    change_values,
    change_data,
    change_base,
    change_base_parameter,
    change_bias,
    switch_off,
    set_strength,
    merge,
    detach,
    add_another,
    add_another_of_a_host,
    take_values,
)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_are_seen(change: Callable[[nn.Module, Network], None], own: bool) -> None:
    """Two models alike; only one has an open lane when the change comes."""
    found = []
    for warm in (False, True):
        model, network = made(nerine.DoRA(nerine.LoRA(rank=3, alpha=2)), own=own)
        x = draw(5, 24)
        before = model(x) if warm else None
        change(model, network)
        found.append(model(x))
        if before is not None:
            assert change is merge or not torch.allclose(before, found[-1], atol=1e-3)
    assert torch.equal(*found)


def test_number_formats_and_modes() -> None:
    model, _ = made(nerine.DoRA(nerine.LoRA(rank=3)), dropout=0.5)
    x = draw(5, 24)
    model.eval()
    assert torch.equal(model(x), model(x))
    assert lane_of(model) is not None
    model.train()
    assert not torch.equal(model(x), model(x)), "dropout is on again"
    assert lane_of(model) is not None
    model.eval()
    model.bfloat16()
    y = model(x.bfloat16())
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, long_way(model, x.bfloat16()))


def test_copies_have_none() -> None:
    model, _ = made(nerine.LoRA(rank=3))
    x = draw(5, 24)
    y = model(x)
    assert lane_of(model) is not None
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert lane_of(other) is None
        assert torch.equal(other(x), y)
    with torch.no_grad():
        weight_of(model).zero_()
    assert torch.equal(other(x), y)


def test_swapped_parameters_are_used() -> None:
    """As torch.func.functional_call and engines that split weights swap them."""
    model, _ = made(nerine.LoRA(rank=3))
    x = draw(5, 24)
    first = model(x)
    state = {name: t.detach() * 2 for name, t in model.named_parameters()}
    second = torch.func.functional_call(model, state, (x,))
    assert not torch.allclose(first, second, atol=1e-2)
    assert torch.equal(model(x), first)
    with torch.no_grad():
        for name, t in model.named_parameters():
            t.copy_(state[name])
    assert torch.equal(model(x), second)


def test_keyword_arguments() -> None:
    model, _ = made(nerine.LoRA(rank=3))
    x = draw(5, 24)
    y = model(x)
    assert torch.equal(model[0](input=x), y)  # type: ignore[index]
