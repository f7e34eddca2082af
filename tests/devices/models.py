"""The models, algorithms and small tools that the tests of devices share. Imported where a second device exists."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import nerine
from nerine.algorithms import REGISTRY, Algorithm, build
from nerine.model.network import Network
from nerine.site import Site
from nerine.testing.battery import around

CPU = torch.device("cpu")
SETTINGS = {
    "lora": {"rank": 2, "alpha": 1.5},
    "loha": {"rank": 2, "alpha": 1.5},
    "lokr": {"rank": 1, "alpha": 0.75, "factor": 2},
    "dylora": {"rank": 4, "alpha": 3.0, "block_size": 2},
    "tlora": {"rank": 2, "alpha": 1.5},
    "glora": {"rank": 2, "alpha": 1.5},
    "full": {},
    "norm": {},
    "ia3": {},
    "diag-oft": {"block_size": 2, "constraint": 5.0},
    "boft": {"block_size": 2},
    "oft-v2": {"block_size": 2},
}
assert SETTINGS.keys() == REGISTRY.keys(), "a new algorithm needs an entry here"


def algorithms_of(name: str) -> list[Algorithm]:
    """An algorithm by itself and with DoRA around it, where that goes."""
    plain = build({"algorithm": name, **SETTINGS[name]})
    return list(around(plain)[:2])


def dropouts_of(algorithm: Algorithm) -> list[dict[str, float]]:
    """Without chance, and with every kind of it that the algorithm knows."""
    every = {"dropout": 0.1, "rank_dropout": 0.2, "module_dropout": 0.1}
    site = Site("norm", (4,), opaque=True) if algorithm.kinds == {"norm"} else Site("linear", (6, 4))
    if not algorithm.design(site).layout.gates(bool(site.kernel)):  # it names no ranks
        del every["rank_dropout"]
    return [{}, every]


class Block(nn.Module):
    """A bit of everything that is called layer by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.b = nn.Linear(10, 6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.relu(self.norm(self.a(x))))
        picture = y.T.reshape(1, 6, 2, -1)
        return x + y + self.conv(picture).flatten(2)[0].T


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 10)
        self.b = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x)))


class Linears(Mixed):
    """Linear layers alone: of others PyTorch keeps the weight by reference, and under engines that exchange the memory
    of a weight after each call it then finds the wrong one in backward, with adapters or without."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual(), Residual()])


def model_of(kind: type[nn.Module] = Mixed) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def input_of(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same tokens each time `[4, 6]`."""
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).to(device, dtype)


def stir(network: Network) -> Network:
    """Move every trained tensor away from where it started, the same way on every device."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_((0.2 * torch.randn(parameter.shape, generator=rng)).to(parameter.device, parameter.dtype))
    return network


def attached(model: nn.Module, algorithm: Algorithm, **options: object) -> Network:
    torch.manual_seed(5)
    return stir(nerine.attach(model, algorithm, **options))


def sgd(network: Network) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(network.parameters()), lr=0.05)


def train(model: nn.Module, x: Tensor, network: Network, optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    """Two steps of two accumulated gradients; the losses."""
    torch.manual_seed(9)
    optimizer = optimizer or sgd(network)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        for _ in range(2):
            loss = model(x).square().mean()
            loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses


def close(got: object, want: object, what: str = "", tolerance: float = 1e-4) -> None:
    got, want = (torch.as_tensor(v).detach().to("cpu", torch.float64) for v in (got, want))
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def same_network(got: Network, want: Network, tolerance: float = 1e-3) -> None:
    theirs = dict(want.named_tensors())
    for key, tensor in got.named_tensors():
        close(tensor, theirs[key], key, tolerance)


def folder() -> Path:
    return Path(tempfile.mkdtemp())


def quiet(model: nn.Module) -> Tensor:
    """The output in eval mode, on the CPU."""
    was = model.training
    model.eval()
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), CPU)
    with torch.no_grad():
        y = model(input_of(device)).cpu()
    model.train(was)
    return y


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
