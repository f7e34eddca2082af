"""Layers to try an algorithm on: every kind that nerine adapts, in odd geometries, seldom square."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nerine.algorithms import Algorithm
from nerine.model.layer import site_of
from nerine.site import Site

__all__ = [
    "CONVS",
    "FEW",
    "LINEARS",
    "NORMS",
    "OTHERS",
    "PLACES",
    "TINY",
    "TRANSPOSED",
    "Place",
    "places_of",
    "site_at",
]


class Conv1D(nn.Module):
    """A linear layer with a weight `[in, out]`, as transformers' GPT-2 has it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).reshape(*x.shape[:-1], self.nf)


class CausalConv1d(nn.Conv1d):
    """A convolution that pads its past by itself."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(functional.pad(input, (self.kernel_size[0] - 1, 0)))


class ScaledEmbedding(nn.Embedding):
    """An embedding that multiplies what it finds."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2.5


class LlamaRMSNorm(nn.Module):
    """An RMSNorm that no library but its own knows."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        size = hidden_states.square().mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(size + 1e-6))


class GemmaRMSNorm(LlamaRMSNorm):
    """One whose scale is kept as its distance from one."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        size = hidden_states.square().mean(-1, keepdim=True)
        return (1 + self.weight) * (hidden_states * torch.rsqrt(size + 1e-6))


@dataclass(frozen=True)
class Place:
    """A layer and the shape of an input for it; with `tokens` the input is that many different whole numbers."""

    name: str
    make: Callable[[], nn.Module]
    input: tuple[int, ...]
    tokens: int = 0

    def __str__(self) -> str:
        return self.name


def _place(name: str, kind: type[nn.Module], args: tuple[Any, ...], shape: tuple[int, ...], **options: Any) -> Place:
    return Place(name, lambda: kind(*args, **options), shape)


LINEARS = (
    _place("linear", nn.Linear, (12, 6), (4, 12)),
    _place("linear 3-D", nn.Linear, (6, 20), (2, 3, 6), bias=False),
    _place("linear one vector", nn.Linear, (10, 4), (10,)),
    _place("linear prime", nn.Linear, (7, 13), (3, 7)),
    _place("linear square", nn.Linear, (8, 8), (2, 8)),
)
CONVS = (
    _place("conv1d", nn.Conv1d, (4, 6, 3), (2, 4, 9), padding=1),
    _place("conv2d strided", nn.Conv2d, (6, 4, 3), (2, 6, 8, 7), stride=2, padding=1),
    _place("conv2d dilated", nn.Conv2d, (4, 6, (3, 2)), (2, 4, 8, 7), dilation=(2, 3), padding=(0, 2), stride=(1, 2)),
    _place("conv2d 1x1", nn.Conv2d, (6, 8, 1), (2, 6, 4, 5), bias=False),
    _place("conv2d prime", nn.Conv2d, (5, 7, 3), (1, 5, 6, 6)),
    _place("conv2d grouped", nn.Conv2d, (6, 12, 3), (2, 6, 6, 5), groups=3, padding=1),
    _place("conv2d depthwise", nn.Conv2d, (6, 6, 3), (2, 6, 6, 5), groups=6),
    _place("conv2d grouped 1x1", nn.Conv2d, (6, 4, 1), (2, 6, 4, 3), groups=2),
    _place("conv2d circular", nn.Conv2d, (4, 6, 3), (2, 4, 6, 5), padding=(1, 2), padding_mode="circular", stride=2),
    _place("conv2d reflect", nn.Conv2d, (4, 6, 3), (2, 4, 6, 5), padding=1, padding_mode="reflect", dilation=2),
    _place("conv2d replicate", nn.Conv2d, (4, 6, 2), (2, 4, 6, 5), padding=1, padding_mode="replicate", groups=2),
    _place("conv2d same, even", nn.Conv2d, (4, 6, (4, 2)), (2, 4, 6, 5), padding="same"),
    _place("conv1d same, dilated", nn.Conv1d, (4, 6, 4), (2, 4, 11), padding="same", dilation=3),
    _place("conv1d same, circular", nn.Conv1d, (4, 6, 4), (2, 4, 9), padding="same", padding_mode="circular"),
    _place("conv1d valid", nn.Conv1d, (6, 4, 3), (2, 6, 9), padding="valid", stride=2),
    _place("conv3d", nn.Conv3d, (4, 6, (1, 3, 2)), (2, 4, 3, 5, 4), padding=(0, 1, 1)),
    _place("conv3d circular", nn.Conv3d, (2, 4, 3), (1, 2, 4, 3, 4), padding=1, padding_mode="circular"),
    _place("conv2d unbatched", nn.Conv2d, (6, 4, 3), (6, 7, 5), padding=1),
    _place("conv1d unbatched", nn.Conv1d, (4, 6, 3), (4, 9), padding=1, padding_mode="circular", groups=2),
)
TRANSPOSED = (
    _place("transposed 1d", nn.ConvTranspose1d, (4, 6, 3), (2, 4, 5), stride=2, padding=1),
    _place("transposed 2d", nn.ConvTranspose2d, (6, 4, (3, 2)), (2, 6, 4, 3), stride=(2, 1), dilation=(1, 2)),
    _place(
        "transposed grouped",
        nn.ConvTranspose2d,
        (6, 4, 3),
        (2, 6, 3, 4),
        groups=2,
        stride=2,
        output_padding=1,
        bias=False,
    ),
    _place("transposed 3d", nn.ConvTranspose3d, (2, 4, 2), (1, 2, 2, 3, 2)),
)
OTHERS = (
    Place("embedding", lambda: nn.Embedding(10, 6), (2, 5), tokens=10),
    Place("embedding padded", lambda: nn.Embedding(7, 8, padding_idx=0), (6,), tokens=7),
    Place("conv1d of gpt", lambda: Conv1D(12, 6), (3, 6)),
    Place("conv causal", lambda: CausalConv1d(4, 6, 3), (2, 4, 7)),
    Place("embedding scaled", lambda: ScaledEmbedding(9, 4), (3, 3), tokens=9),
)
NORMS = (
    _place("layer norm", nn.LayerNorm, (6,), (2, 3, 6)),
    _place("layer norm 2-D", nn.LayerNorm, ((3, 4),), (2, 3, 4), bias=False),
    _place("group norm", nn.GroupNorm, (2, 6), (2, 6, 4)),
    _place("batch norm", nn.BatchNorm2d, (4,), (3, 4, 2, 3)),
    _place("rms norm", nn.RMSNorm, (6,), (2, 3, 6)),
    Place("rms norm of llama", lambda: LlamaRMSNorm(6), (2, 3, 6)),
    Place("rms norm of gemma", lambda: GemmaRMSNorm(6), (2, 3, 6)),
)
PLACES = LINEARS + CONVS + TRANSPOSED + OTHERS + NORMS
FEW = tuple(
    place
    for place in PLACES
    if place.name in ("linear", "linear prime", "conv2d strided", "conv1d unbatched", "embedding", "layer norm")
)  # for contracts that the geometry has little to do with
TINY = tuple(place for place in PLACES if place.name in ("linear one vector", "conv1d unbatched", "rms norm"))


def site_at(place: Place) -> Site:
    """The site of the layer at `place`."""
    return site_of(place.make(), place.name)


def places_of(algorithm: Algorithm, places: tuple[Place, ...] = PLACES) -> tuple[Place, ...]:
    """Those of `places` on which `algorithm` can act."""
    return tuple(place for place in places if not algorithm.unsuited(site_at(place)))
