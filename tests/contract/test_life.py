"""Putting on and taking off: names, owners, order, and that nothing of nerine stays behind."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import nerine
from contract.cases import ALGORITHMS, FEW, ONE_OF_EACH, PLACES
from nerine.algorithms import Algorithm, DoRA, LoHa, LoKr, LoRA
from nerine.testing.battery import close, input_at, is_random, layer_at, layer_like, stir
from nerine.testing.places import site_at

THREE = (("a", DoRA(LoRA(rank=2, alpha=1.0))), ("b", LoKr(rank=1, alpha=2.0)), ("c", LoHa(rank=1, alpha=0.5)))


def trace(model: nn.Module) -> dict[str, Any]:
    """Everything that an adapter could leave behind."""
    found: dict[str, Any] = {"keys": list(model.state_dict()), "modules": [n for n, _ in model.named_modules()]}
    for path, module in model.named_modules():
        found[path] = (
            type(module),
            list(module.__dict__),
            list(module._modules),
            {
                k: (id(p), p.requires_grad, p.data_ptr(), p._version)
                for k, p in module._parameters.items()
                if p is not None
            },
            {k: len(v) for k, v in module.__dict__.items() if k.endswith("_hooks")},
            module.training,
            module.forward.__func__ if hasattr(module.forward, "__func__") else module.forward,
        )
    return found


def small_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Flatten(2), nn.Linear(12, 10), nn.LayerNorm(10)).double()


@pytest.mark.parametrize("own", [(True, True, True), (False, True, False), (False, False, False)], ids=str)
@pytest.mark.parametrize("order", list(permutations("abc")), ids="".join)
def test_detaching_in_any_order_leaves_no_trace(order: tuple[str, ...], own: tuple[bool, ...]) -> None:
    model = small_model()
    model[3].weight.requires_grad_(False)
    before = trace(model)
    networks = {
        name: nerine.attach(model, algorithm, targets=nn.Module, name=name, own=mine)
        for (name, algorithm), mine in zip(THREE, own, strict=True)
    }
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64)
    model(x).sum().backward()
    for name in order:
        networks[name].detach()
        networks[name].detach()  # twice is once
    assert trace(model) == before


@pytest.mark.parametrize("order", list(permutations("abc")), ids="".join)
def test_the_rest_go_on_while_some_are_detached(order: tuple[str, ...]) -> None:
    model = small_model()
    networks = {name: nerine.attach(model, algorithm, targets=nn.Module, name=name) for name, algorithm in THREE}
    for i, network in enumerate(networks.values()):
        stir(network, seed=i)
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64)
    for i, name in enumerate(order):
        with nerine.Network.of(model).paused():
            for other in order[i + 1 :]:
                networks[other].on()
            want = model(x)
        networks[name].detach()
        close(model(x), want, f"without {order[: i + 1]}")


def test_detached_while_merged_gives_the_bits_back() -> None:
    model = small_model()
    before = trace(model)
    bits = model[2].weight.detach().clone()
    network = nerine.attach(model, LoRA(rank=2, alpha=1.0))
    stir(network)
    network.merge()
    network.detach()
    assert torch.equal(model[2].weight, bits)
    assert {k: v[1:3] for k, v in trace(model).items() if isinstance(v, tuple)} == {
        k: v[1:3] for k, v in before.items() if isinstance(v, tuple)
    }


def test_merged_for_good_leaves_plain_layers_with_the_merged_weight() -> None:
    model = small_model()
    before = trace(model)
    network = nerine.attach(model, DoRA(LoKr(rank=1, alpha=2.0)))
    stir(network)
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64)
    want = model(x)
    network.merge(keep_original=False)
    network.detach()
    close(model(x), want, "merged for good")
    assert trace(model)["keys"] == before["keys"]
    assert trace(model)["modules"] == before["modules"]


def test_frozen_by_attach_and_freed_by_detach() -> None:
    model = small_model()
    model[0].bias.requires_grad_(False)
    network = nerine.attach(model, LoRA(rank=2, alpha=1.0))
    own = {id(p) for p in network.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    network.detach()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["0.bias"]


def test_not_frozen_where_not_asked() -> None:
    model = small_model()
    nerine.attach(model, LoRA(rank=2, alpha=1.0), freeze=False)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("algorithm", ONE_OF_EACH, ids=str)
def test_owned_adapters_are_children_of_their_layers(algorithm: Algorithm) -> None:
    model = small_model()
    network = nerine.attach(model, algorithm)
    inside = {n for n, _ in model.named_parameters()}
    assert {
        f"{k.rpartition('.')[0]}.nerine.default.{k.rpartition('.')[2]}" for k, _ in network.named_parameters()
    } <= inside
    assert all(p.is_leaf and p.requires_grad and isinstance(p, nn.Parameter) for p in network.parameters())
    assert all(a.training for *_, a in network.adapters())
    model.eval()
    assert not any(a.training for *_, a in network.adapters())


@pytest.mark.parametrize("algorithm", ONE_OF_EACH, ids=str)
def test_adapters_of_a_host_are_not(algorithm: Algorithm) -> None:
    """As sd-scripts does it: attach, then freeze and cast the whole model; the adapters stay trainable and fp32."""
    model = small_model().float()
    keys = list(model.state_dict())
    network = nerine.attach(model, algorithm, targets=nn.Module, own=False)
    stir(network)
    assert list(model.state_dict()) == keys
    model.requires_grad_(False)
    model.to(torch.bfloat16)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in network.parameters())
    model(torch.randn(2, 4, 3, 4, dtype=torch.bfloat16)).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    model.eval()
    assert all(a.training for *_, a in network.adapters())
    network.eval()
    assert not any(a.training for *_, a in network.adapters())
    network.requires_grad_(False).to(torch.float64)
    assert all(p.dtype == torch.float64 and not p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_every_tensor_of_a_half_precision_base_is_trained(algorithm: Algorithm, dtype: torch.dtype) -> None:
    """The seed of the classic DoRA bug: a magnitude that is no registered leaf, and so is neither moved nor trained."""
    place = next(p for p in PLACES if p.name == "conv2d strided")
    if algorithm.unsuited(site_at(place)):
        place = next(p for p in PLACES if p.name == "group norm")
    model = nn.Sequential(layer_at(place, dtype)).train(not is_random(algorithm))
    network = nerine.attach(model, algorithm, targets=nn.Module)
    stir(network)
    assert all(p.dtype == torch.float32 and p.is_leaf for p in network.parameters())
    before = {k: t.detach().clone() for k, t in network.named_parameters()}
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    model(input_at(place, dtype)).float().square().sum().backward()
    optimizer.step()
    undone = ("rescale",) if getattr(algorithm, "axis", "") == "out" else ()  # DoRA's norm takes it out again
    assert all(not torch.equal(t, before[k]) for k, t in network.named_parameters() if k.split(".")[-1] not in undone)


@pytest.mark.parametrize("own", [True, False], ids=["own", "host"])
def test_two_names_on_one_layer(own: bool) -> None:
    place = FEW[0]
    model = nn.Sequential(layer_at(place))
    first = nerine.attach(model, LoRA(rank=2, alpha=1.0), name="first", own=own)
    second = nerine.attach(model, DoRA(LoHa(rank=1, alpha=0.5)), name="second", own=own)
    with pytest.raises(nerine.OptionError, match="already has an adapter called 'first'"):
        nerine.attach(model, LoRA(rank=1), name="first")
    stir(first, 1)
    stir(second, 2)
    both = nerine.Network.of(model)
    assert both.names == ("first", "second")
    assert len(both) == 2
    assert set(both.state_dict()) == {f"0.first.{n}" for n in ("down", "up")} | {
        f"0.second.{n}" for n in ("magnitude", "w1_a", "w1_b", "w2_a", "w2_b")
    }
    x = input_at(place)
    base = layer_at(place)(x)
    parts = []
    for other in (second, first):
        other.off()
        parts.append(model(x) - base)
        other.on()
    close(model(x) - base, parts[0] + parts[1], "two names")
    before = model(x)
    both.merge()
    close(model(x), before, "two names merged")
    both.unmerge()
    assert torch.equal(model(x), before)
    assert torch.equal(layer_like(model[0]).weight, layer_at(place).weight)


# -- without memory --------------------------------------------------------------------------------------------------
class Watch(TorchDispatchMode):
    """Writes down every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


VARIANTS = [a if a.kinds == {"norm"} else DoRA(a) for a in ALGORITHMS if not isinstance(a, DoRA)]


@pytest.mark.parametrize("make", [small_model, lambda: small_model().to("meta")], ids=["cpu", "meta"])
@pytest.mark.parametrize("algorithm", VARIANTS, ids=str)
def test_plan_computes_nothing(algorithm: Algorithm, make: Callable[[], nn.Module]) -> None:
    model = make()
    before = trace(model)
    with Watch() as watch:
        plan = nerine.plan(model, algorithm, targets=nn.Module)
        str(plan)
        plan.to_dict()
    assert watch.seen == []
    assert trace(model) == before
    network = nerine.attach(model, algorithm, targets=nn.Module)
    assert plan.params == sum(p.numel() for p in network.parameters())
    shapes = {f"{r.layer}.{name}": shape for r in plan.rows for name, shape in r.tensors.items()}
    assert {k: tuple(p.shape) for k, p in network.named_tensors() if not k.endswith("scalar")} == shapes


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_a_model_without_memory(algorithm: Algorithm) -> None:
    """On the meta device everything but values works: attach, forward, backward, merge; nothing strays to the CPU."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Flatten(2), nn.Linear(12, 10), nn.LayerNorm(10))
        x = torch.randn(2, 4, 3, 4)
    network = nerine.attach(model, algorithm, targets=nn.Module, dropout=0.1, rank_dropout=0.1, module_dropout=0.1)
    assert all(p.device.type == "meta" for p in network.parameters())
    for through_weight in (False, True):
        for *_, adapter in network.adapters():
            adapter.prefers_weight = through_weight
        y: Tensor = model(x)
        assert (y.shape, y.device.type) == ((2, 6, 10), "meta")
        y.sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    network.detach()
