"""A model of a few blocks with names as UNets have them, its weights in a file, and adapters for it in files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nerine
from nerine.algorithms import Algorithm
from nerine.files.store import write_file

ATTENTION = {"to_q": (48, 32), "to_k": (48, 40), "to_v": (32, 40)}


class Attention(nn.Module):
    """Three projections, none of them square."""

    def __init__(self) -> None:
        super().__init__()
        for name, (out, inputs) in ATTENTION.items():
            setattr(self, name, nn.Linear(inputs, out, bias=name == "to_q"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1 = Attention()
        self.attn2 = Attention()
        self.ff = nn.ModuleDict({"net": nn.ModuleList([nn.Linear(32, 64), nn.Identity(), nn.Linear(64, 32)])})
        self.norm1 = nn.LayerNorm(32)


class Model(nn.Module):
    """Attention in three places, a convolution on the way in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv_in = nn.Conv2d(4, 16, 3)
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"attentions": nn.ModuleList([Block(), Block()])})])
        self.mid_block = nn.ModuleDict({"attentions": nn.ModuleList([Block()])})
        self.up_blocks = nn.ModuleList([nn.ModuleDict({"attentions": nn.ModuleList([Block()])})])


LAYERS = tuple(path for path, module in Model().named_modules() if isinstance(module, nn.Linear | nn.Conv2d))


def base_of(folder: Path) -> Path:
    """The model as a checkpoint."""
    file = folder / "base.safetensors"
    write_file(file, {key: t.detach() for key, t in Model().state_dict().items()}, {})
    return file


def adapter_of(
    file: Path,
    algorithm: Algorithm,
    *,
    seed: int = 1,
    size: float = 0.2,
    targets: Any = (nn.Linear, nn.Conv2d),
    still: Iterable[str] = (),
    dialect: str = "lycoris",
    **options: Any,
) -> Path:
    """A file with such an adapter on the model, with values that no initialisation has; those at `still` untrained."""
    network = nerine.attach(Model(), algorithm, targets=targets)
    generator = torch.Generator().manual_seed(seed)
    quiet = set(still)
    with torch.no_grad():
        for path, _, _, _, adapter in network.located():
            for p in adapter.parameters():
                noise = size * torch.randn(p.shape, generator=generator)
                p.add_(noise if path not in quiet else 0.0)
    nerine.save(network, file, dialect=dialect, **options)
    return file


def weights(file: Path) -> dict[str, torch.Tensor]:
    """{path: the change that this file makes to the weight of that layer}, by merging it into the live model."""
    model = Model()
    before = {path: model.get_submodule(path).weight.detach().clone() for path in LAYERS}
    nerine.load(model, file, strict=True).merge()
    return {path: model.get_submodule(path).weight.detach().clone() - old for path, old in before.items()}
