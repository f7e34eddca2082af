"""What the battery runs over: settings of every algorithm, and layers to put them on.

A new algorithm enters the whole battery through one entry in `SETTINGS`. Settings come in variants, one for every
layout and option; alpha is never the rank, ranks are sometimes larger than the layer, layers are seldom square.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from nerine.algorithms import REGISTRY, Algorithm, DoRA

# registry name -> variants; the first of each stands for the algorithm where a test is slow
SETTINGS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "lora": (
        {"rank": 2, "alpha": 1.5},
        {"rank": 3, "alpha": 1.0, "tucker": True},
        {"rank": 2, "alpha": 3.0, "scalar": True},
        {"rank": 4, "alpha": 3.0, "rs": True},
        {"rank": 17, "alpha": 4.0},
    ),
    "loha": (
        {"rank": 2, "alpha": 1.5},
        {"rank": 1, "alpha": 0.5},
        {"rank": 2, "alpha": 1.0, "tucker": True},
        {"rank": 2, "alpha": 3.0, "scalar": True},
        {"rank": 2, "alpha": 1.0, "tucker": True, "scalar": True},
        {"rank": 4, "alpha": 3.0, "rs": True},
    ),
    "lokr": (
        {"rank": 1, "alpha": 0.75},
        {"rank": 1, "alpha": 2.0, "factor": 2},
        {"rank": 1, "alpha": 2.0, "decompose_both": True},
        {"rank": 1, "alpha": 2.0, "tucker": True, "factor": 2},
        {"rank": 1, "alpha": 2.0, "tucker": True, "decompose_both": True, "unbalanced": True},
        {"rank": 1, "alpha": 2.0, "unbalanced": True, "factor": 2},
        {"full_matrix": True},
        {"rank": 1, "alpha": 2.0, "scalar": True},
        {"full_matrix": True, "scalar": True, "factor": 3},
        {"rank": 1, "alpha": 2.0, "rs": True, "decompose_both": True, "factor": 2},
        {"rank": 17, "factor": 2},
    ),
}


@dataclass(frozen=True)
class Place:
    """A layer and the shape of an input for it."""

    name: str
    make: Callable[[], nn.Module]
    input: tuple[int, ...]

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
PLACES = LINEARS + CONVS
FEW = tuple(
    place for place in PLACES if place.name in ("linear", "linear prime", "conv2d strided", "conv1d unbatched")
)  # for contracts that the geometry has little to do with
TINY = tuple(place for place in PLACES if place.name in ("linear one vector", "conv1d unbatched"))


def around(algorithm: Algorithm) -> tuple[Algorithm, ...]:
    """`algorithm` plain, and with DoRA around it on either axis."""
    return algorithm, DoRA(algorithm), DoRA(algorithm, axis="in")


def _all(first_only: bool) -> tuple[Algorithm, ...]:
    variants = ((name, s) for name in REGISTRY for s in (SETTINGS[name][:1] if first_only else SETTINGS[name]))
    return tuple(wrapped for name, settings in variants for wrapped in around(REGISTRY[name](**settings)))


ALGORITHMS = _all(first_only=False)
ONE_OF_EACH = _all(first_only=True)


def places_for(algorithm: Algorithm) -> tuple[Place, ...]:
    """All places for one variant of each algorithm, few for the others (only the faces see the full product)."""
    return PLACES if algorithm in ONE_OF_EACH else FEW
