"""The promise, tried on this machine: every algorithm on a small layer, trained = merged = exported = reloaded.

In memory and in a temporary folder; a second or two on a CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from nerine import api
from nerine.algorithms import REGISTRY, Algorithm, DoRA, LoKr, LoRA, Norm
from nerine.errors import MergeError
from nerine.model.fitting import attach
from nerine.model.network import Network
from nerine.tools.doctor.report import Check

__all__ = ["LIMIT", "checks"]

LIMIT = 1e-4  # relative to the largest output, in fp32
_SIZE = 0.2  # standard deviation of what the training would have made of the parameters


class _Small(nn.Module):
    """Layers of the two kinds that algorithms are for, neither of them square: x `[3, 24]` to `[3, 16]`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.norm = nn.LayerNorm(24)
        self.linear = nn.Linear(24, 16)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=rng) / 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(self.norm(x))
        return found


def checks(devices: list[str]) -> Iterator[Check]:
    """One check for each algorithm on each device; what raises is a check that does not hold."""
    algorithms = {name: _example(kind) for name, kind in REGISTRY.items()}
    algorithms |= {"dora(lora)": DoRA(LoRA(rank=4)), "dora(lokr)": DoRA(LoKr(rank=4, factor=4))}
    for device in devices:
        for name, algorithm in algorithms.items():
            try:
                reloaded, merged = _differences(algorithm, device)
            except Exception as error:  # the report is about whatever goes wrong here
                yield Check(name, device, float("nan"), float("nan"), False, f"{type(error).__name__}: {error}")
            else:
                yield Check(name, device, reloaded, merged, reloaded <= LIMIT and merged <= LIMIT)


def _example(kind: type[Algorithm]) -> Algorithm:
    """The algorithm with its own settings, at rank 4 where it has one."""
    return kind(rank=4) if "rank" in kind.__dataclass_fields__ else kind()


@torch.no_grad()
def _differences(algorithm: Algorithm, device: str) -> tuple[float, float]:
    """(reloaded, merged): the largest differences of the output, relative to its largest entry."""
    rng = torch.Generator().manual_seed(0)
    targets = "norm" if isinstance(algorithm, Norm) else "linear"
    base = _Small(1).to(device).eval()
    x = torch.randn(3, 24, generator=rng).to(device)
    trained = _Small(1).to(device).eval()  # in training some draw ranks
    network = attach(trained, algorithm, targets=targets, generator=torch.Generator(device).manual_seed(2))
    for parameter in network.parameters():
        parameter.add_((torch.randn(parameter.shape, generator=rng) * _SIZE).to(parameter))
    y = trained(x)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"
        api.save(network, file)
        other = _Small(1).to(device).eval()
        loaded: Network = api.load(other, file)
        again = other(x)
        loaded.merge()
        merged = other(x)
    largest = float(y.abs().max())
    if float((y - base(x)).abs().max()) < LIMIT * largest:
        raise MergeError("the adapter changes nothing, so that the check shows nothing")
    return float((again - y).abs().max()) / largest, float((merged - y).abs().max()) / largest
