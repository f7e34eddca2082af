"""A model of one adapted layer, the same at every call, for tests of how a layer computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import nerine
from nerine.algorithms import Algorithm
from nerine.model.network import Network


def made(algorithm: Algorithm, layer: nn.Module | None = None, **more: Any) -> tuple[nn.Module, Network]:
    """A model of one layer whose adapter has values."""
    rng = torch.Generator().manual_seed(3)
    layer = nn.Linear(24, 16) if layer is None else layer
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) / 4)
    model = nn.Sequential(layer.requires_grad_(False))
    network = nerine.attach(model, algorithm, **more)
    with torch.no_grad():
        for name, p in network.named_parameters():
            noise = torch.randn(p.shape, generator=rng) / 8
            p.add_(noise) if name.endswith(("magnitude", "rescale")) else p.copy_(noise)
    return model, network


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))
