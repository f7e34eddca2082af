"""PEFT again, for OFT and IA3: the same tensors give the same output, and where they do not it is on purpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nerine
from nerine.algorithms import IA3, OFTv2

peft = pytest.importorskip("peft", reason="needs peft: pip install 'nerine[peers]'")

pytestmark = [pytest.mark.peers, pytest.mark.no_device_guard]

INPUTS = {"lin": (3, 24), "bare": (3, 24), "one": (2, 12, 5, 6), "conv": (2, 12, 5, 6), "plain": (2, 12, 5, 6)}


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "lin": nn.Linear(24, 30),
        "bare": nn.Linear(24, 30, bias=False),
        "one": nn.Conv2d(12, 20, 1, stride=2),
        "conv": nn.Conv2d(12, 20, 3, padding=1, stride=2),
        "plain": nn.Conv2d(12, 20, 3, bias=False),
    }


def model_of(name: str) -> nn.ModuleDict:
    return nn.ModuleDict({name: layers()[name]})


def x_of(name: str) -> Tensor:
    return torch.randn(INPUTS[name], generator=torch.Generator().manual_seed(1))


def theirs(config: Any, name: str) -> tuple[nn.Module, nn.Parameter]:
    """PEFT's layer and its one stirred parameter."""
    layer = peft.inject_adapter_in_model(config, model_of(name))[name]
    (parameter,) = (p for key, p in layer.named_parameters() if not key.startswith("base_layer"))
    with torch.no_grad():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return layer, parameter


def ours(algorithm: Any, name: str, tensor: Tensor) -> tuple[nn.Module, nerine.Network]:
    model = model_of(name)
    network = nerine.attach(model, algorithm)
    ((key, parameter),) = network.named_parameters()
    network.load_state_dict({key: tensor.detach().reshape(parameter.shape)})
    return model[name], network


def assert_same(got: Tensor, want: Tensor, base: Tensor) -> None:
    change = (want - base).norm().detach()
    assert change > 1e-2 * base.norm(), "nothing to compare"
    assert float((got - want).norm().detach() / change) < 1e-5


def assert_same_gradients(layer: nn.Module, parameter: Tensor, module: nn.Module, network: Any, x: Tensor) -> None:
    for m in (layer, module):
        m(x).square().sum().backward()
    (own,) = network.parameters()
    torch.testing.assert_close(own.grad, parameter.grad.reshape(own.shape), rtol=1e-3, atol=1e-3)


def oft(name: str, size: int, terms: int) -> Any:
    return peft.OFTConfig(
        target_modules=[name],
        oft_block_size=size,
        use_cayley_neumann=bool(terms),
        **({"num_cayley_neumann_terms": terms} if terms else {}),
    )


# -- OFT -------------------------------------------------------------------------------------------------------------
SIZES = {"lin": 8, "bare": 3, "one": 4, "conv": 12, "plain": 27}


@pytest.mark.parametrize("terms", [5, 0, 4, 8])
@pytest.mark.parametrize("name", ["lin", "bare", "one"])
def test_oft_has_their_outputs_and_gradients(name: str, terms: int) -> None:
    layer, parameter = theirs(oft(name, SIZES[name], terms), name)
    module, network = ours(OFTv2(block_size=SIZES[name], terms=terms), name, parameter)
    x = x_of(name)
    assert_same(module(x), layer(x), model_of(name)[name](x))
    assert_same_gradients(layer, parameter, module, network, x)


@pytest.mark.parametrize("terms", [5, 0])
@pytest.mark.parametrize("name", SIZES)
def test_oft_has_their_merged_weight(name: str, terms: int) -> None:
    layer, parameter = theirs(oft(name, SIZES[name], terms), name)
    module, network = ours(OFTv2(block_size=SIZES[name], terms=terms), name, parameter)
    x = x_of(name)
    applied = module(x)
    layer.merge()
    network.merge()
    assert_same(module.weight, layer.get_base_layer().weight, layers()[name].weight)
    assert_same(module(x), layer(x), layers()[name](x))
    torch.testing.assert_close(module(x), applied, rtol=1e-4, atol=1e-5)


def test_oft_turns_the_other_way_without_the_series() -> None:
    """Of the same tensors, their exact transform is nearly the transpose of their series. Ours has both, as `terms`."""
    turns = []
    for terms in (8, 0):
        layer, parameter = theirs(oft("lin", 8, terms), "lin")
        with torch.no_grad():
            parameter.mul_(0.2)
        turns.append(layer.get_delta_weight("default").detach())
        module, network = ours(OFTv2(block_size=8, terms=terms), "lin", parameter)
        network.merge()
        torch.testing.assert_close(module.weight, layers()["lin"].weight @ turns[-1].mT, rtol=1e-4, atol=1e-5)
    assert (turns[0] - turns[1].mT).norm() < 1e-3
    assert (turns[0] - turns[1]).norm() > 0.5


@pytest.mark.parametrize("name", ["conv", "plain"])
def test_oft_of_a_real_kernel_is_what_it_merges_to(name: str) -> None:
    """A difference on purpose: their forward folds overlapping patches into a sum, so that even without any turn it is
    not the layer, and it is not what they merge. Ours is the merged layer."""
    layer, parameter = theirs(oft(name, SIZES[name], 5), name)
    module, _ = ours(OFTv2(block_size=SIZES[name]), name, parameter)
    x, base = x_of(name), layers()[name]
    unmerged = layer(x).detach()
    with torch.no_grad():
        stirred = parameter.clone()
        parameter.zero_()
        assert (layer(x) - base(x)).norm() > 0.5 * base(x).norm()
        parameter.copy_(stirred)
    layer.merge()
    assert_same(module(x), layer(x), base(x))
    assert (unmerged - layer(x)).norm() > 0.5 * layer(x).norm()


def test_oft_at_another_strength() -> None:
    """Theirs has no strength. Ours is W + s·(W' - W), here for a layer that turns its input instead of its weight."""
    layer, parameter = theirs(oft("lin", 8, 5), "lin")
    module, network = ours(OFTv2(block_size=8), "lin", parameter)
    x, base = x_of("lin"), layers()["lin"]
    network.strength = 0.4
    torch.testing.assert_close(module(x), 0.6 * base(x) + 0.4 * layer(x), rtol=1e-4, atol=1e-5)
    network.strength = 0
    assert torch.equal(module(x), base(x))


def test_oft_block_sizes_that_do_not_divide() -> None:
    """Both take the nearest size that does, the smaller of two; theirs warns, ours is a note in the report."""
    with pytest.warns(UserWarning, match="Adjusted `oft_block_size` to"):
        _, parameter = theirs(oft("lin", 7, 5), "lin")
    network = nerine.attach(model_of("lin"), OFTv2(block_size=7))
    (own,) = network.parameters()
    assert own.shape == parameter.shape
    assert network.report.notes == ("blocks of 6, which divides rows of 24",)


# -- IA3 -------------------------------------------------------------------------------------------------------------
def ia3(name: str, on_input: bool) -> Any:
    return peft.IA3Config(target_modules=[name], feedforward_modules=[name] if on_input else [])


@pytest.mark.parametrize(
    ("name", "on_input"),
    [*((name, True) for name in INPUTS), ("bare", False), ("plain", False)],
)
def test_ia3_has_their_outputs_gradients_and_merge(name: str, on_input: bool) -> None:
    """Feed-forward is on the input. Their factors start from one, ours from zero."""
    layer, parameter = theirs(ia3(name, on_input), name)
    module, network = ours(IA3(on_input=on_input), name, parameter - 1)
    x, base = x_of(name), layers()[name]
    assert_same(module(x), layer(x), base(x))
    assert_same_gradients(layer, parameter, module, network, x)
    layer.merge()
    network.merge()
    assert_same(module.weight, layer.get_base_layer().weight, base.weight)


@pytest.mark.parametrize("name", ["lin", "conv"])
def test_ia3_leaves_the_bias(name: str) -> None:
    """A difference on purpose: on outputs they multiply the bias as well. Ours changes the weight alone, as LyCORIS
    merges it, so that a file means one thing; the two differ by bias·w."""
    layer, parameter = theirs(ia3(name, False), name)
    module, network = ours(IA3(), name, parameter - 1)
    x, base = x_of(name), layers()[name]
    w = (parameter - 1).detach().flatten()
    offset = (base.bias * w).reshape(-1, *[1] * (module(x).dim() - 2))
    torch.testing.assert_close(layer(x), module(x) + offset, rtol=1e-4, atol=1e-5)
    assert offset.abs().max() > 0.01
    layer.merge()
    network.merge()
    assert torch.equal(module.bias, base.bias)
    assert_same(module.weight, layer.get_base_layer().weight, base.weight)
    torch.testing.assert_close(layer.get_base_layer().bias, base.bias * (1 + w))
