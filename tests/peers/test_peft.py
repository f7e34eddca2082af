"""The same tensors through PEFT: equal outputs for LoRA, DoRA, LoHa and LoKr."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nerine
from nerine import DoRA, LoHa, LoKr, LoRA

peft = pytest.importorskip("peft", reason="needs peft: pip install 'nerine[peers]'")

pytestmark = [pytest.mark.peers, pytest.mark.no_device_guard]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(24, 30)
        self.conv = nn.Conv2d(12, 20, 3, padding=1, stride=2)

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.lin(x), self.conv(image)


X, IMAGE = torch.linspace(-1, 1, 72).reshape(3, 24), torch.linspace(-1, 2, 360).reshape(1, 12, 5, 6).sin()
# theirs -> ours, by name of the tensor
NAMES = {
    "lora_A": "down",
    "lora_B": "up",
    "lora_magnitude_vector": "magnitude",
    "hada_w1_a": "w1_a",
    "hada_w1_b": "w1_b",
    "hada_w2_a": "w2_a",
    "hada_w2_b": "w2_b",
    "hada_t1": "t1",
    "hada_t2": "t2",
    "lokr_w1": "w1",
    "lokr_w1_a": "w1_a",
    "lokr_w1_b": "w1_b",
    "lokr_w2": "w2",
    "lokr_w2_a": "w2_a",
    "lokr_w2_b": "w2_b",
    "lokr_t2": "t2",
}


def theirs(config: Any) -> nn.Module:
    model = peft.inject_adapter_in_model(config, Model())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in NAMES for part in name.split(".")):
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def tensors_of(model: nn.Module, layer: str) -> dict[str, Tensor]:
    found = {}
    for name, p in model.get_submodule(layer).named_parameters():
        known = [part for part in name.split(".") if part in NAMES]
        if known:
            found[NAMES[known[0]]] = p.detach()
    return found


def ours(model: nn.Module, algorithm: Any, layers: tuple[str, ...]) -> tuple[nn.Module, nerine.Network]:
    own = Model()
    network = nerine.attach(own, algorithm, targets=list(layers))
    shapes = {k: t.shape for k, t in network.state_dict().items()}
    state = {f"{layer}.{k}": t for layer in layers for k, t in tensors_of(model, layer).items()}
    assert shapes.keys() == state.keys()
    network.load_state_dict({k: t.reshape(shapes[k]) for k, t in state.items()})
    return own, network


BOTH = ("lin", "conv")
CASES = {
    "LoRA": (lambda: peft.LoraConfig(r=4, lora_alpha=3, target_modules=list(BOTH)), LoRA(rank=4, alpha=3), BOTH),
    "rsLoRA": (
        lambda: peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=list(BOTH)),
        LoRA(rank=4, alpha=3, rs=True),
        BOTH,
    ),
    "DoRA": (
        lambda: peft.LoraConfig(r=4, lora_alpha=3, use_dora=True, target_modules=list(BOTH)),
        DoRA(LoRA(rank=4, alpha=3), detach_norm=True),
        BOTH,
    ),
    "LoHa": (lambda: peft.LoHaConfig(r=4, alpha=3, target_modules=list(BOTH)), LoHa(rank=4, alpha=3), BOTH),
    "LoHa, effective conv": (
        lambda: peft.LoHaConfig(r=4, alpha=3, use_effective_conv2d=True, target_modules=["conv"]),
        LoHa(rank=4, alpha=3, tucker=True),
        ("conv",),
    ),
    "LoKr": (lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=["lin"]), LoKr(rank=2, alpha=3), ("lin",)),
    "LoKr of both": (
        lambda: peft.LoKrConfig(r=1, alpha=3, decompose_both=True, target_modules=["lin"]),
        LoKr(rank=1, alpha=3, decompose_both=True),
        ("lin",),
    ),
    "LoKr, effective conv": (
        lambda: peft.LoKrConfig(r=2, alpha=3, use_effective_conv2d=True, target_modules=["conv"]),
        LoKr(rank=2, alpha=3, tucker=True),
        ("conv",),
    ),
}
WRONG_BACKWARD = "LoHa, effective conv"  # PEFT 0.21 writes its gradient by hand, and not that of its own forward


@pytest.mark.parametrize("case", CASES)
def test_equal_outputs_and_gradients(case: str) -> None:
    config, algorithm, layers = CASES[case]
    model = theirs(config())
    own, network = ours(model, algorithm, layers)
    base = Model()(X, IMAGE)
    for got, want, plain in zip(own(X, IMAGE), model(X, IMAGE), base, strict=True):
        change = (want - plain).norm().detach()
        assert float((got - want).detach().norm()) <= 1e-5 * float(change if change > 0 else plain.detach().norm())
    if case == WRONG_BACKWARD:
        return
    for m in (own, model):
        sum(y.square().sum() for y in m(X, IMAGE)).backward()
    gradients = {f"{layer}.{k}": p for layer in layers for k, p in gradients_of(model, layer).items()}
    for key, p in network.named_parameters():
        torch.testing.assert_close(p.grad, gradients[key].reshape(p.shape), rtol=1e-3, atol=1e-3)


def gradients_of(model: nn.Module, layer: str) -> dict[str, Tensor]:
    found = {}
    for name, p in model.get_submodule(layer).named_parameters():
        known = [part for part in name.split(".") if part in NAMES]
        if known:
            found[NAMES[known[0]]] = p.grad
    return found


@pytest.mark.parametrize("case", CASES)
def test_equal_merges(case: str) -> None:
    config, algorithm, layers = CASES[case]
    model = theirs(config())
    own, network = ours(model, algorithm, layers)
    network.merge()
    for layer in layers:
        module = model.get_submodule(layer)
        module.merge()
        want = module.get_base_layer().weight
        torch.testing.assert_close(own.get_submodule(layer).weight, want, rtol=1e-4, atol=1e-5)


def test_gradients_that_theirs_are_not() -> None:
    """Of PEFT's effective LoHa convolution: ours are those of autograd through the formula, spelled out."""
    config, algorithm, layers = CASES[WRONG_BACKWARD]
    own, network = ours(theirs(config()), algorithm, layers)
    own(X, IMAGE)[1].square().sum().backward()
    t = {k.removeprefix("conv."): p.detach().clone().requires_grad_() for k, p in network.state_dict().items()}
    halves = [torch.einsum("pqkl,po,qi->oikl", t[f"t{i}"], t[f"w{i}_a"], t[f"w{i}_b"]) for i in (1, 2)]
    base = Model().conv
    weight = base.weight.detach() + 3 / 4 * halves[0] * halves[1]
    nn.functional.conv2d(IMAGE, weight, base.bias.detach(), stride=2, padding=1).square().sum().backward()
    for key, p in network.named_parameters():
        torch.testing.assert_close(p.grad, t[key.removeprefix("conv.")].grad, rtol=1e-3, atol=1e-3)


def test_full_factors_have_no_scale_here() -> None:
    """A difference on purpose: PEFT divides alpha by the rank also where both factors are full.

    LyCORIS files, and every program that reads them, have scale 1 there; the files would mean something else otherwise.
    """
    model = theirs(peft.LoKrConfig(r=64, alpha=16, target_modules=["lin"]))
    own, network = ours(model, LoKr(rank=64, alpha=16), ("lin",))
    base = Model().lin.weight
    network.merge()
    delta = own.lin.weight - base
    torch.testing.assert_close(model.lin.get_delta_weight("default"), delta * 16 / 64, rtol=1e-4, atol=1e-6)


def test_strength_zero_is_the_base_for_dora() -> None:
    """A difference on purpose: PEFT scales inside the norm, so that scale 0 still leaves m/|W|."""
    model = theirs(peft.LoraConfig(r=4, lora_alpha=3, use_dora=True, target_modules=["lin"]))
    own, network = ours(model, DoRA(LoRA(rank=4, alpha=3)), ("lin",))
    model.lin.set_scale("default", 0)
    network.strength = 0
    assert torch.equal(own.lin(X), Model().lin(X))
    assert not torch.allclose(model.lin(X), Model().lin(X), atol=1e-2)
