"""Which way a layer computes may depend on how many positions there are, and never changes what it computes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import nerine
import one_layer
from nerine.algorithms import Algorithm, weight_pays_from
from nerine.model.adapter import Adapter
from nerine.model.network import Network
from nerine.site import Site


def made(algorithm: Algorithm, layer: nn.Module) -> tuple[nn.Module, Network, Adapter]:
    model, network = one_layer.made(algorithm, layer)
    ((_, _, adapter),) = network.adapters()
    return model, network, adapter


def test_many_passes_pay_earlier_and_large_products_never() -> None:
    site = Site("linear", (64, 64))
    few, many = weight_pays_from(512, site, 6), weight_pays_from(512, site, 18)
    assert 1 < many < few < math.inf
    assert weight_pays_from(8 * 2048, Site("linear", (1024, 1024)), 6) == math.inf


@pytest.mark.parametrize(
    ("algorithm", "layer"),
    [
        (nerine.LoKr(factor=4, full_matrix=True), nn.Linear(64, 48)),
        (nerine.BOFT(block_size=4), nn.Linear(256, 64)),
        (nerine.DoRA(nerine.LoRA(rank=4, alpha=2)), nn.Conv2d(24, 32, 1, stride=2)),
    ],
    ids=str,
)
def test_both_ways_compute_the_same(algorithm: Algorithm, layer: nn.Module) -> None:
    model, network, adapter = made(algorithm, layer)
    assert adapter.prefers_weight is None, "neither always nor never"
    rng = torch.Generator().manual_seed(5)
    side = math.ceil(adapter.weight_pays_from**0.5) + 1
    conv = isinstance(layer, nn.Conv2d)
    shape = (1, 24, 2 * side, 2 * side) if conv else (side, side, adapter.site.shape[1])
    x = torch.randn(shape, generator=rng, requires_grad=True)
    assert adapter.takes_weight(x)
    assert not adapter.takes_weight(x[:1, :, :2, :2] if conv else x[:1, :2])
    found = []
    for way in (None, False, True):
        adapter.prefers_weight = way
        for p in (x, *network.parameters()):
            p.grad = None
        y = model(x)
        y.square().mean().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in network.parameters())])
    for one, beside, through in zip(*found, strict=True):
        assert torch.equal(one, through)
        torch.testing.assert_close(beside, through, rtol=1e-4, atol=1e-5)


def test_half_precision_stays_beside_the_layer() -> None:
    """Where a changed weight would lose the deviation."""
    model, _, adapter = made(nerine.LoKr(factor=4, full_matrix=True), nn.Linear(64, 48))
    model.bfloat16()
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    assert adapter.takes_weight(x)
    y = model(x)
    adapter.prefers_weight = False
    assert torch.equal(model(x), y)
