"""What the distributed tests train: a small model, its batches, and the single process to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import nerine
from nerine.algorithms import REGISTRY, Algorithm
from nerine.testing.battery import around

SETTINGS = {
    "lora": {"rank": 2, "alpha": 1.5, "scalar": True},
    "loha": {"rank": 2, "alpha": 1.5},
    "lokr": {"rank": 1, "alpha": 0.75, "factor": 2},
    "dylora": {"rank": 4, "alpha": 3.0, "block_size": 2},
    "tlora": {"rank": 2, "alpha": 1.5},
    "glora": {"rank": 2, "alpha": 1.5},
    "full": {"bias": True},
    "norm": {"bias": True},
    "ia3": {},
    "diag-oft": {"block_size": 3, "rescale": True},
    "boft": {"block_size": 2},
    "oft-v2": {"block_size": 2},
}
# every algorithm of the registry, alone and within DoRA over its outputs
ALGORITHMS: tuple[Algorithm, ...] = tuple(
    wrapped
    for name in REGISTRY
    for wrapped in around(REGISTRY[name](**SETTINGS.get(name, {})))
    if getattr(wrapped, "axis", "out") == "out"
)


class Block(nn.Module):
    """A block of a model: a norm, two projections, a shortcut."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return y


class Model(nn.Module):
    """Two blocks between a convolution and a head."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.inlet = nn.Conv1d(4, width, 3, padding=1)
        self.blocks = nn.ModuleList([Block(width, 18), Block(width, 10)])
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x).mT
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


def model(dtype: torch.dtype = torch.float64) -> Model:
    """The base, the same in every process."""
    torch.manual_seed(1)
    return Model().to(dtype)


def attached(algorithm: Algorithm, base: nn.Module | None = None, **options: Any) -> tuple[Any, nerine.Network]:
    """The base with adapters that do something; the same in every process."""
    base = model() if base is None else base
    network = nerine.attach(base, algorithm, generator=torch.Generator().manual_seed(2), **options)
    return base, network


def stir(network: nerine.Network) -> None:
    """Move every tensor away from where it started, the same way in every process."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape, generator=rng, dtype=p.dtype), alpha=0.05)


def batch(step: int, part: int | None = None, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Input and target of a step; the half of one rank, or the whole."""
    rng = torch.Generator().manual_seed(100 + step)
    x = torch.randn(4, 4, 7, generator=rng, dtype=dtype)
    y = torch.randn(4, 7, 5, generator=rng, dtype=dtype)
    return (x, y) if part is None else (x[2 * part : 2 * part + 2], y[2 * part : 2 * part + 2])


def loss_of(model: Callable[[Tensor], Tensor], step: int, part: int | None = None) -> Tensor:
    x, y = batch(step, part)
    return (model(x) - y).square().mean()


def train(
    model: Callable[[Tensor], Tensor], parameters: Iterable[nn.Parameter], part: int | None = None, steps: int = 2
) -> list[float]:
    """A few steps; the losses."""
    optimiser = torch.optim.SGD(list(parameters), lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        optimiser.zero_grad()
        torch.manual_seed(step)  # what an algorithm draws (DyLoRA) is then the same in every process
        loss = loss_of(model, step, part)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def copied(network: nerine.Network) -> dict[str, Tensor]:
    """The tensors of a network, as they are now."""
    return {key: t.detach().clone() for key, t in network.named_tensors()}


def alone(algorithm: Algorithm, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    """What a single process makes of the whole batches: losses and tensors."""
    base, network = attached(algorithm, **options)
    stir(network)
    losses = train(base, network.parameters())
    return losses, copied(network)


__all__ = ["ALGORITHMS", "Model", "alone", "attached", "batch", "copied", "loss_of", "model", "stir", "train"]
