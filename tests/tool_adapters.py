"""A small model with every kind of layer, adapters on it as files, and what a file makes of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nerine
from nerine.algorithms import Algorithm
from nerine.files.store import write_file

LAYERS = ("block.to_q", "block.conv", "block.point", "block.ff")


class Model(nn.Module):
    """Non-square layers: linear, 3x3 and 1x1 convolution, a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.block = nn.ModuleDict(
            {
                "to_q": nn.Linear(12, 18),
                "conv": nn.Conv2d(6, 10, 3),
                "point": nn.Conv2d(8, 12, 1),
                "ff": nn.Linear(24, 16, bias=False),
                "norm": nn.LayerNorm(12),
            }
        )


def base_of(folder: Path) -> Path:
    """The model as a checkpoint."""
    file = folder / "base.safetensors"
    write_file(file, {key: t.detach() for key, t in Model().state_dict().items()}, {})
    return file


def stirred(network: nerine.Network, seed: int = 1, size: float = 0.3) -> nerine.Network:
    """With values that no initialisation has."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return network


def adapter_of(
    file: Path,
    algorithm: Algorithm,
    targets: Any = (nn.Linear, nn.Conv2d),
    *,
    seed: int = 1,
    dialect: str = "lycoris",
    **options: Any,
) -> Path:
    """A file with such an adapter on the model's layers."""
    network = nerine.attach(Model(), algorithm, targets=targets, **options)
    nerine.save(stirred(network, seed), file, dialect=dialect)
    return file


def weights(*adapters: tuple[Path, Any]) -> dict[str, Tensor]:
    """The model's tensors with these files merged into them at their strengths."""
    model = Model()
    for number, (file, strength) in enumerate(adapters):
        nerine.load(model, file, strength=strength, name=f"a{number}", strict=True)
    if adapters:
        nerine.Network.of(model).merge()
    return {key: t.detach().clone() for key, t in model.state_dict().items() if ".nerine" not in key}


def moved(*adapters: tuple[Path, Any]) -> dict[str, Tensor]:
    """By how much these files change the tensors that they change."""
    before, after = weights(), weights(*adapters)
    return {key: after[key] - before[key] for key in before if not torch.equal(after[key], before[key])}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """The same tensors have moved, by the same up to `tolerance` of the largest entry."""
    assert found.keys() == wanted.keys()
    assert wanted
    for key, want in wanted.items():
        off = float((found[key] - want).abs().max()) / float(want.abs().max())
        assert off < tolerance, f"{key}: {off:.2g}"


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor], keys: Sequence[str] = ()) -> float:
    """|found - wanted| / |wanted| over all of these tensors."""
    keys = keys or list(wanted)
    off = sum(float((found.get(key, torch.zeros_like(wanted[key])) - wanted[key]).square().sum()) for key in keys)
    return (off / sum(float(wanted[key].square().sum()) for key in keys)) ** 0.5
