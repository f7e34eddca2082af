"""What only concerns training: limits, read-outs, ranks that follow time or chance, and where a LoRA starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize as torch_parametrize

import nerine
from contract.cases import ALGORITHMS
from nerine import DoRA, DyLoRA, Full, LoRA, Norm, OptionError, ShapeError, TargetError, TLoRA, UnsupportedBase
from nerine.algorithms import Algorithm
from nerine.model.layer import site_of
from nerine.testing.battery import close, stir

pytestmark = pytest.mark.no_device_guard  # one device only

LINEAR = site_of(nn.Linear(6, 4))


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Flatten(2), nn.Linear(12, 10), nn.LayerNorm(10)).double()


# -- limits and read-outs --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if not isinstance(a, DoRA)], ids=str)
def test_max_norm_limits_every_deviation(algorithm: Algorithm) -> None:
    model = small_model()
    network = nerine.attach(model, algorithm, targets=nn.Module)
    stir(network)
    before = {path: size for path, size, *_ in network.norms().rows}
    limit = 0.7 * min(before.values())
    found = network.max_norm(10 * max(before.values()))
    assert (found.shrunk, {path: size for path, size, *_ in network.norms().rows}) == (0, before)
    found = network.max_norm(limit)
    assert found.shrunk == len(before)
    assert all(type(value) in (int, float) for value in (found.shrunk, found.mean, found.largest))
    for holder, mount, _, adapter in network.placed():
        p = adapter.folded()
        p = p.without("rescale") if "rescale" in p.tensors else p
        weight = adapter.site.canonical(holder.weight)
        dense = float((algorithm.weight(p, weight) - weight).detach().norm())
        assert dense == pytest.approx(limit, rel=0.02), mount.path
        assert found.largest == pytest.approx(limit, rel=0.02)


@pytest.mark.parametrize("limit", [0, -1, float("inf"), float("nan"), "1", True], ids=str)
def test_a_bad_limit(limit: Any) -> None:
    network = nerine.attach(small_model(), LoRA(rank=2))
    with pytest.raises(OptionError, match="max_norm: the limit must be a positive number"):
        network.max_norm(limit)


def test_norms_of_weights_and_gradients() -> None:
    model = small_model()
    network = nerine.attach(model, LoRA(rank=2, alpha=1.0))
    stir(network)
    assert [row[3] for row in network.norms().rows] == [0, 0]
    model(torch.randn(2, 4, 3, 4, dtype=torch.float64)).square().sum().backward()
    report = network.norms()
    for (path, size, weight, gradient), (_, _, adapter) in zip(report.rows, network.adapters(), strict=True):
        layer = model.get_submodule(path)
        delta = adapter.algorithm.weight(adapter.folded(), layer.weight) - layer.weight
        assert size == pytest.approx(float(delta.detach().norm()), rel=1e-6)
        assert weight == pytest.approx(float(layer.weight.norm()), rel=1e-6)
        whole = torch.cat([p.grad.flatten() for p in adapter.parameters()])
        assert gradient == pytest.approx(float(whole.norm()), rel=1e-6)
    assert "|W' - W|" in str(report)
    assert report.to_dict()["layers"][0]["layer"] == "0"


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_lora_plus_reaches_every_algorithm(algorithm: Algorithm) -> None:
    network = nerine.attach(small_model(), algorithm, targets=nn.Module)
    groups = {group["lr"]: group["params"] for group in network.param_groups(1e-3, lora_plus=16)}
    assert groups[16e-3]
    assert sum(len(params) for params in groups.values()) == sum(1 for _ in network.parameters())


# -- ranks that follow chance ----------------------------------------------------------------------------------------
def test_dylora_trains_one_block_with_those_below_it() -> None:
    model = nn.Sequential(nn.Linear(6, 5)).double()
    network = nerine.attach(model, DyLoRA(rank=5, alpha=2.0, block_size=2))
    stir(network)
    ((_, _, adapter),) = network.adapters()
    x = torch.randn(3, 6, dtype=torch.float64)
    base = model[0].weight @ x.mT + model[0].bias[:, None]
    seen = {}
    for seed in range(60):
        torch.manual_seed(seed)
        network.train()
        adapter.zero_grad()
        y = model(x)
        y.sum().backward()
        learnt = tuple((adapter.up.grad != 0).any(0).nonzero().flatten().tolist())
        assert tuple((adapter.down.grad != 0).any(1).nonzero().flatten().tolist()) == learnt
        last = learnt[-1] + 1
        want = base + 2.0 / 5 * adapter.up[:, :last] @ adapter.down[:last] @ x.mT
        close(y, want.mT, f"ranks below {last}")
        seen[learnt] = seen.get(learnt, 0) + 1
    assert seen.keys() == {(0, 1), (2, 3), (4,)}
    assert min(seen.values()) >= 10  # a third of 60 each: below ten happens once in a thousand
    network.eval()
    close(model(x), (base + 2.0 / 5 * adapter.up @ adapter.down @ x.mT).mT, "eval")


# -- ranks that follow time ------------------------------------------------------------------------------------------
def test_tlora_uses_fewer_ranks_where_there_is_more_noise() -> None:
    model = nn.Sequential(nn.Linear(8, 6)).double()
    network = nerine.attach(model, TLoRA(rank=4, alpha=2.0, min_rank=1))
    assert "until Network.set_timestep is told the timesteps" in network.report.notes[0]
    stir(network)
    ((_, _, adapter),) = network.adapters()
    x = torch.randn(3, 8, dtype=torch.float64)
    base = nn.functional.linear(x, model[0].weight, model[0].bias)
    t = adapter.params().tensors
    for time, ranks in ((1000, 1), (999, 1), (667, 1), (666, 2), (333, 3), (1, 3), (0, 4)):
        network.set_timestep(time)
        mask = (torch.arange(4) < ranks).double()
        delta = t["p"] * (t["lambda"] * mask) @ t["q"] - t["base_p"] * (t["base_lambda"] * mask) @ t["base_q"]
        close(model(x), base + 0.5 * x @ delta.mT, f"t = {time}")
    network.eval()
    full = model(x)
    network.train()
    network.set_timestep(None)
    close(model(x), full, "outside training, and without a timestep, all ranks take part")


@pytest.mark.parametrize("layer", ["linear", "folded", "conv"])
def test_each_sample_has_its_own_ranks(layer: str) -> None:
    if layer == "conv":
        model, x = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)), torch.randn(3, 4, 5, 5)
    else:
        model, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(3, 7, 8)
    network = nerine.attach(model, TLoRA(rank=4))
    stir(network)
    times = torch.tensor([0.0, 500.0, 1000.0])
    network.set_timestep(times)
    got = model(x.flatten(0, 1)).unflatten(0, (3, 7)) if layer == "folded" else model(x)
    for i, time in enumerate(times):
        network.set_timestep(time)
        torch.testing.assert_close(got[i : i + 1], model(x[i : i + 1]))
    assert not torch.allclose(got[2], got[0])


def test_one_norm_for_a_batch_needs_one_timestep() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    network = nerine.attach(model, DoRA(TLoRA(rank=4)))
    network.set_timestep(torch.tensor([0.0, 500.0]))
    with pytest.raises(OptionError, match="give it one timestep"):
        model(torch.randn(2, 8))
    network.set_timestep(500)
    model(torch.randn(2, 8))
    with pytest.raises(ShapeError, match="timestep: expected one number or one for each sample"):
        network.set_timestep(torch.zeros(2, 2))


def test_two_networks_have_their_own_time() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    one, two = (nerine.attach(model, TLoRA(rank=4), name=name) for name in "ab")
    one.set_timestep(3)
    assert [a.context.timestep is None for *_, a in two.adapters()] == [True]
    nerine.Network.of(model).set_timestep(5)
    assert [float(a.context.timestep) for *_, a in two.adapters()] == [5]


def test_the_penalty_is_the_distance_from_orthogonal_factors() -> None:
    model = nn.Sequential(nn.Linear(8, 6)).double()
    network = nerine.attach(model, TLoRA(rank=3))
    assert float(network.penalty().detach()) == pytest.approx(0, abs=1e-20)
    stir(network)
    t = next(network.adapters())[2].params().tensors
    eye = torch.eye(3, dtype=torch.float64)
    want = (t["q"] @ t["q"].mT - eye).square().sum() + (t["p"].mT @ t["p"] - eye).square().sum()
    assert float(network.penalty().detach()) == pytest.approx(float(want.detach()))
    network.penalty().backward()
    assert float(nerine.attach(nn.Sequential(nn.Linear(3, 3)), LoRA(rank=2)).penalty().detach()) == 0


# -- where a LoRA starts ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal", "pissa", "olora"])
@pytest.mark.parametrize("layer", [lambda: nn.Linear(12, 8), lambda: nn.Conv2d(4, 6, 3)], ids=["linear", "conv"])
def test_every_start_changes_nothing(layer: Any, init: str) -> None:
    model = nn.Sequential(layer()).double()
    x = torch.randn(*((2, 12) if isinstance(model[0], nn.Linear) else (2, 4, 5, 5)), dtype=torch.float64)
    base = model(x)
    network = nerine.attach(model, LoRA(rank=3, alpha=1.5, init=init))
    assert torch.equal(model(x), base)
    state = network.state_dict()
    down = state["0.down"].flatten(1)
    if init == "orthogonal":
        close(down @ down.mT, torch.eye(3, dtype=torch.float64), "rows of down")
    if init in ("pissa", "olora"):
        weight = model[0].weight.detach().flatten(1)
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        leading = (u[:, :3] * s[:3]) @ vh[:3]
        if init == "pissa":
            close(state["0.up"].flatten(1) @ down, leading, "leading directions")
        else:
            q, r = torch.linalg.qr(weight)
            close(state["0.up"].flatten(1) @ down, q[:, :3] @ r[:3], "QR")
        assert [k for k, p in network.named_parameters()] == ["0.down", "0.up"]


def test_a_start_on_the_weight_is_saved_as_a_plain_lora(tmp_path: Any) -> None:
    """Any program reads it: twice the rank, and no tensor that is not LoRA's."""
    model = nn.Sequential(nn.Linear(12, 8))
    network = nerine.attach(model, LoRA(rank=3, alpha=1.5, init="pissa"))
    stir(network)
    nerine.save(network, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {
        "lycoris_0.lora_down.weight": (6, 12),
        "lycoris_0.lora_up.weight": (8, 6),
        "lycoris_0.alpha": (),
    }
    delta = (
        float(tensors["lycoris_0.alpha"])
        / 6
        * tensors["lycoris_0.lora_up.weight"]
        @ tensors["lycoris_0.lora_down.weight"]
    )
    ((_, _, adapter),) = network.adapters()
    torch.testing.assert_close(
        adapter.algorithm.weight(adapter.params(), model[0].weight) - model[0].weight, delta, rtol=1e-4, atol=1e-5
    )
    other = nerine.attach(nn.Sequential(nn.Linear(12, 8)), LoRA(rank=3, alpha=1.5, init="pissa"))
    nerine.load(other, tmp_path / "a.safetensors")
    for key, tensor in other.state_dict().items():
        torch.testing.assert_close(tensor, network.state_dict()[key])


# -- the parametrization face ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if not a.unsuited(LINEAR)], ids=str)
def test_parametrize(algorithm: Algorithm) -> None:
    layer = nn.Linear(6, 4, bias=False).double()
    bits = layer.weight.detach().clone()
    adapter = nerine.parametrize(layer, "weight", algorithm).eval()
    close(layer.weight, bits, "a fresh adapter")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator).double() * 0.3)
    want = algorithm.weight(adapter.folded(), bits)
    close(layer.weight, want, "read from outside")
    x = torch.randn(3, 6, dtype=torch.float64)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    assert layer.parametrizations.weight.original.grad is None
    adapter.strength = 0.0
    assert torch.equal(layer.weight, bits)
    adapter.strength = 1.0
    torch_parametrize.remove_parametrizations(layer, "weight")
    close(layer.weight, want, "removed")


def test_parametrize_refuses() -> None:
    with pytest.raises(TargetError, match=r"Linear has no parameter 'weights'\. Its parameters: weight, bias"):
        nerine.parametrize(nn.Linear(3, 4), "weights", LoRA())
    with pytest.raises(UnsupportedBase, match="LoRA does not act on a norm layer"):
        nerine.parametrize(nn.LayerNorm(4), "weight", LoRA())
    with pytest.raises(OptionError, match="moves bias as well"):
        nerine.parametrize(nn.Linear(3, 4), "weight", Full())
    with pytest.raises(UnsupportedBase, match="2 or 3 dimensions"):
        nerine.parametrize(nn.Linear(3, 4), "bias", LoRA())
    nerine.parametrize(nn.LayerNorm(4), "weight", Norm(bias=False))
