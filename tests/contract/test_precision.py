"""Numbers in bf16 and under autocast: small deviations survive, and formats are those of the base."""

from __future__ import annotations

import pytest
import torch

from contract.cases import ALGORITHMS, ONE_OF_EACH, PLACES, few, places_of
from nerine.algorithms import Algorithm, Call, Params
from nerine.model.adapter import Adapter, start
from nerine.model.layer import site_of
from nerine.testing.battery import adapted, by_weight, call_of, input_at, path_of
from nerine.testing.places import site_at

pytestmark = [
    pytest.mark.no_device_guard,  # one device only, and many small operations
    pytest.mark.filterwarnings("ignore:Using padding='same'"),  # torch's, of the base layer
]

NOISE = {"dropout": 0.1, "rank_dropout": 0.1, "module_dropout": 0.1}


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_a_rounded_base_costs_the_deviation_nothing(algorithm: Algorithm) -> None:
    """fp32 activations, a weight kept in bf16: the deviation is that of fp64 to half a percent."""
    for place in places_of(algorithm):
        if site_at(place).opaque:
            continue  # there the module itself computes with the weight
        model, _, adapter = adapted(algorithm, place, torch.bfloat16)
        got, want = deviations(adapter, model[0], input_at(place, torch.float32))
        assert got.dtype == torch.float32
        error = float((got - want).norm() / want.norm())
        assert error < 5e-3, f"{algorithm} at {place}: {error:.1e}"


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_a_change_of_a_thousandth_survives_a_bf16_base(algorithm: Algorithm) -> None:
    """|W' - W| = |W| / 1000: its output is right to half a percent of it, where a sum in bf16 would lose nearly all."""
    for place in few(algorithm):
        if site_at(place).opaque:
            continue  # there the module itself computes with the weight
        model, network, adapter = adapted(algorithm, place, torch.bfloat16)
        layer, x = model[0], input_at(place, torch.float32)
        weight = adapter.site.canonical(layer.weight)
        size = float(weight.float().norm())
        with torch.no_grad():
            network.max_norm(size / 1000)
            if "magnitude" in adapter.names:
                norm = start(algorithm, adapter.site, weight, None).tensors["magnitude"]
                adapter.magnitude.copy_(norm * (1 + torch.randn_like(norm) / 1000))
        if "rescale" in adapter.names:
            with torch.no_grad():
                adapter.rescale.copy_(1 + torch.randn_like(adapter.rescale) / 1000)
        change = algorithm.weight_deviation(doubled(adapter.folded()), weight.double()).norm()
        assert 1e-4 < float(change) / size < 4e-3, f"{algorithm} at {place}: not the change that this is about"
        got, want = deviations(adapter, layer, x)
        error = float((got - want).norm() / want.norm())
        assert error < 5e-3, f"{algorithm} at {place}: {error:.1e} of the change"


def deviations(adapter: Adapter, layer: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the adapter adds for fp32 activations and the layer's weight as it is kept; and the same all in fp64."""
    params, algorithm = adapter.folded(), adapter.algorithm
    params = params.filled(t.detach() for t in params.tensors.values())
    wide, weight = layer_with(layer, torch.float32), adapter.site.canonical(layer.weight)
    call = Call(site_of(wide), x, wide(x), getattr(wide, "bias", None), lambda: weight)
    exact = call_of(layer_with(layer, torch.float64), as_double(x))
    return algorithm.deviation(params, call), algorithm.deviation(doubled(params), exact)


def doubled(params: Params) -> Params:
    return params.filled(t.detach().double() for t in params.tensors.values())


def as_double(x: torch.Tensor) -> torch.Tensor:
    """The same numbers in fp64; tokens stay whole."""
    return x.detach().double() if x.is_floating_point() else x


def layer_with(layer: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The base of an adapted layer in another format."""
    plain = type(layer).__new__(type(layer))
    plain.__dict__ = {k: v for k, v in layer.__dict__.items() if k != "forward" and not k.startswith("_nerine")}
    plain._modules = {}
    plain._parameters = {
        k: None if p is None else torch.nn.Parameter(p.detach().to(dtype), requires_grad=False)
        for k, p in layer._parameters.items()
    }
    return plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_half_precision_throughout(algorithm: Algorithm, dtype: torch.dtype) -> None:
    """Base and activations in half precision: finite, of the base's format, and right to the format's own rounding."""
    for place in few(algorithm):
        model, network, adapter = adapted(algorithm, place, dtype)
        x = input_at(place, dtype, requires_grad=not place.tokens)
        want = by_weight(algorithm, doubled(adapter.folded()), layer_with(model[0], torch.float64), as_double(x))
        for through_weight in (False, True):
            with path_of(adapter, through_weight):
                y = model(x)
            assert y.dtype == dtype
            error = float((y.detach().double() - want).norm() / want.norm())
            assert error < 8 * torch.finfo(dtype).eps, f"{algorithm} at {place}: {error:.1e}"
            y.float().square().sum().backward()
        gradients = [p.grad for p in network.parameters()]
        assert all(torch.isfinite(g).all() and g.dtype == torch.float32 for g in gradients)
        assert place.tokens or (torch.isfinite(x.grad).all() and x.grad.dtype == dtype)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "noise", [{}, {"dropout": 0.1, "rank_dropout": 0.1, "module_dropout": 0.1}], ids=["calm", "noise"]
)
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_autocast(algorithm: Algorithm, noise: dict[str, float], base: torch.dtype) -> None:
    """Under autocast: finite, of the base's output format, close to the same without autocast."""
    for place in few(algorithm):
        model, network, adapter = adapted(algorithm, place, base, **noise)
        plain = layer_with(model[0], base)
        if adapter.site.kind == "norm" and base is torch.bfloat16:
            continue  # torch itself has no such mix on the CPU
        x = input_at(place, torch.float32, requires_grad=not place.tokens)
        for through_weight in (False, True):
            with path_of(adapter, through_weight):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    y = model(x)
                    assert y.dtype == plain(x).dtype
                y.float().sum().backward()
                assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
                if not noise and base is torch.float32:
                    exact = model(x.detach())
                    assert exact.dtype == torch.float32
                    error = float((y.detach() - exact.detach()).norm() / exact.detach().norm())
                    assert error < 0.03, f"{algorithm} at {place}: {error:.1e}"


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if not hasattr(a, "axis")], ids=str)
def test_norms_and_weights_do_not_follow_autocast(algorithm: Algorithm) -> None:
    """m/|V| - 1 is small, so that norms, and with them their factors, stay in fp32; so does a merge."""
    for place in places_of(algorithm):
        model, network, adapter = adapted(algorithm, place, torch.float32)
        params, weight = adapter.folded(), adapter.site.canonical(model[0].weight)
        if adapter.site.kind == "norm":
            continue  # it has no rows
        want, fresh = algorithm.row_norm(params, weight), weight.detach().clone()
        changed = algorithm.weight(params, weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = algorithm.row_norm(params, weight)
            network.merge()
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=lambda m, p=place: f"{algorithm} at {p}: {m}")
        merged = adapter.site.canonical(model[0].weight)
        torch.testing.assert_close(merged, changed, rtol=1e-5, atol=1e-6)
        assert not torch.equal(merged, fresh)


@pytest.mark.parametrize("algorithm", ONE_OF_EACH, ids=str)
def test_a_small_deviation_survives_bf16(algorithm: Algorithm) -> None:
    """The deviation is computed beside the layer: of 0.1 % of the weight, where (W + dW) - W in bf16 loses most."""
    place = next(p for p in PLACES if p.name == "linear 3-D")
    if algorithm.unsuited(site_at(place)):
        return
    model, _, adapter = adapted(algorithm, place, torch.bfloat16)
    adapter.strength = 1e-3
    params = adapter.folded()
    x = input_at(place, torch.bfloat16)
    base = layer_with(model[0], torch.bfloat16)
    y = base(x)
    call = Call(site_of(base), x, y, base.bias, lambda: base.weight)
    got = adapter.weighted(algorithm.deviation(Params(params.tensors, params.scale), call)).detach().double()
    exact = layer_with(base, torch.float64)
    want = 1e-3 * algorithm.deviation(doubled(params), call_of(exact, x.double()))
    assert float((got - want).norm() / want.norm()) < 0.02


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_double_precision_is_not_lowered(algorithm: Algorithm) -> None:
    for place in few(algorithm):
        model, network, _ = adapted(algorithm, place)
        assert all(p.dtype == torch.float64 for p in network.parameters())
        assert model(input_at(place)).dtype == torch.float64
