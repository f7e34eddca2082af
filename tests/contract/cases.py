"""What the battery runs over: settings of every algorithm, and layers to put them on.

A new algorithm enters the whole battery through one entry in `SETTINGS`. Settings come in variants, one for every
layout and option; alpha is never the rank, ranks are sometimes larger than the layer, layers are seldom square.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nerine.algorithms import REGISTRY, Algorithm
from nerine.testing.battery import around
from nerine.testing.places import FEW, PLACES, TINY, Place, places_of

__all__ = [
    "ALGORITHMS",
    "FEW",
    "ONE_OF_EACH",
    "PLACES",
    "SETTINGS",
    "TINY",
    "Place",
    "around",
    "few",
    "places_for",
    "places_of",
]

# registry name -> variants; the first of each stands for the algorithm where a test is slow
SETTINGS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "lora": (
        {"rank": 2, "alpha": 1.5},
        {"rank": 3, "alpha": 1.0, "tucker": True},
        {"rank": 2, "alpha": 3.0, "scalar": True},
        {"rank": 4, "alpha": 3.0, "rs": True},
        {"rank": 17, "alpha": 4.0, "init": "orthogonal"},
        {"rank": 2, "alpha": 1.5, "init": "gaussian"},
        {"rank": 2, "alpha": 1.5, "init": "pissa"},
        {"rank": 17, "alpha": 4.0, "init": "olora"},
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
    "dylora": (
        {"rank": 4, "alpha": 3.0, "block_size": 2},
        {"rank": 4, "alpha": 3.0, "block_size": 3, "rs": True},
    ),
    "tlora": (
        {"rank": 2, "alpha": 1.5, "min_rank": 1},
        {"rank": 4, "alpha": 3.0, "init": "last", "rs": True},
        {"rank": 17, "alpha": 2.0, "init": "middle", "power": 2.0, "timesteps": 10},
        {"rank": 2, "alpha": 3.0, "init": "random"},
    ),
    "glora": (
        {"rank": 2, "alpha": 1.5},
        {"rank": 2, "alpha": 3.0, "scalar": True},
        {"rank": 4, "alpha": 3.0, "rs": True},
    ),
    "full": ({"bias": True}, {"bias": False}),
    "norm": ({"bias": True}, {"bias": False}),
    "ia3": ({"on_input": False}, {"on_input": True}),
    "diag-oft": (
        {"block_size": 2},
        {"block_size": 3, "constraint": 0.0625, "rescale": True},
    ),
    "boft": (
        {"block_size": 2},
        {"block_size": 4, "stages": 1, "constraint": 0.0625, "rescale": True},
    ),
    "oft-v2": ({"block_size": 2}, {"block_size": 3, "terms": 0}),
}


def _all(first_only: bool) -> tuple[Algorithm, ...]:
    variants = ((name, s) for name in REGISTRY for s in (SETTINGS[name][:1] if first_only else SETTINGS[name]))
    return tuple(wrapped for name, settings in variants for wrapped in around(REGISTRY[name](**settings)))


ALGORITHMS = _all(first_only=False)
ONE_OF_EACH = _all(first_only=True)


def few(algorithm: Algorithm) -> tuple[Place, ...]:
    """The few places, of those on which the algorithm acts."""
    return places_of(algorithm, FEW)


def places_for(algorithm: Algorithm) -> tuple[Place, ...]:
    """All places for one variant of each algorithm, few for the others (only the faces see the full product)."""
    return places_of(algorithm, PLACES if algorithm in ONE_OF_EACH else FEW)
