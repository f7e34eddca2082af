"""A file's keys taken apart: which layer each belongs to, and what it is in the canonical spelling.

The canonical spelling of a tensor is the key that its layout gives it (`lora_down.weight`, `hada_w1_a`, `dora_scale`);
every dialect is translated into it before anything is understood.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from nerine.algorithms import REGISTRY, Algorithm, Layout, Shape
from nerine.errors import FormatError, OptionError, shown
from nerine.files.store import Source

__all__ = ["ALPHA", "MAGNITUDE", "Known", "Parts", "Piece", "Stem", "is_zero", "piece_of", "split"]

ALPHA, MAGNITUDE = "alpha", "dora_scale"

# What one and the same tensor is called elsewhere. A name that other programs put in the place of X is cut out first.
SPELLINGS: Mapping[str, str] = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_A": "lora_down.weight",
    "lora_B": "lora_up.weight",
    "lora_embedding_A": "lora_down.weight",
    "lora_embedding_B": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_linear_layer.down.weight": "lora_down.weight",
    "lora_linear_layer.up.weight": "lora_up.weight",
    "lora_down": "lora_down.weight",
    "lora_up": "lora_up.weight",
    "lora_mid": "lora_mid.weight",
    "lora_magnitude_vector": MAGNITUDE,
    "lora_magnitude_vector.weight": MAGNITUDE,
    "magnitude": MAGNITUDE,
    "oft_R": "oft_R.weight",
    "lora_B.bias": "lora_bias",
    "ia3_l": "ia3_l",
    "oft_R.scaled_oft": "scaled_oft",
    "a1": "a1.weight",
    "a2": "a2.weight",
    "b1": "b1.weight",
    "b2": "b2.weight",
}
_NAMED = ("lora_A", "lora_B", "lora_magnitude_vector", "oft_R")
_NAMED_LAST = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "oft_R", "ia3_l")
EXTRA = frozenset({ALPHA, MAGNITUDE, "scale", "lora_bias", "bias_indices", "bias_values", "bias_size"})


class Stem(NamedTuple):
    """The name of a layer in a file: as it stands there, the part of the pipeline, and the rest of the name."""

    text: str
    component: str
    name: str
    flat: bool  # the name has underscores in place of its dots


@dataclass(frozen=True)
class Piece:
    """One tensor of a layer: its key (empty where it stands in none), its shape, and how to bring it."""

    key: str
    shape: Shape
    dtype: torch.dtype
    read: Callable[[], Tensor]

    def changed(self, change: Callable[[Tensor], Tensor], shape: Shape | None = None) -> Piece:
        """This piece as `change` makes it, which gives it `shape`."""
        return replace(self, shape=self.shape if shape is None else shape, read=lambda: change(self.read()))


@dataclass
class Parts:
    """All layers of a file as pieces by canonical suffix, what was not understood and why, and embeddings."""

    layers: dict[Stem, dict[str, Piece]] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    embeddings: dict[str, dict[str, Piece]] = field(default_factory=dict)

    def add(self, stem: Stem, suffix: str, piece: Piece, where: object) -> None:
        """Put a piece where it belongs.

        Raises:
            FormatError: two keys of the file mean the same tensor.
        """
        pieces = self.layers.setdefault(stem, {})
        if suffix in pieces:
            raise FormatError(
                f"{where}: {shown(pieces[suffix].key)} and {shown(piece.key)} both are the {suffix} of one layer; "
                "the file was put together from two"
            )
        pieces[suffix] = piece


def piece_of(source: Source, key: str) -> Piece:
    """The tensor of a key as it stands in the file."""
    return Piece(key, source.shape(key), source.dtype(key), lambda: source.read(key))


def is_zero(piece: Piece) -> bool:
    """Whether a piece is the single number zero."""
    return math.prod(piece.shape) == 1 and not bool(piece.read().reshape(-1)[0].to(torch.float64))


class Known:
    """Every layout of every algorithm, with an instance that has the default settings; looked up by keys.

    Raises:
        OptionError: an algorithm of the user's has settings without defaults.
    """

    def __init__(self, others: Iterable[type[Algorithm]] = ()) -> None:
        self.layouts: list[tuple[Algorithm, Layout]] = []
        for kind in dict.fromkeys([*REGISTRY.values(), *others]):
            try:
                algorithm = kind()
            except TypeError as error:
                raise OptionError(
                    f"{kind.__name__}: to be read from files, every setting needs a default ({error})"
                ) from None
            self.layouts += [(algorithm, layout) for layout in algorithm.layouts]
        self.by_keys: dict[frozenset[str], list[tuple[Algorithm, Layout]]] = {}
        for algorithm, layout in self.layouts:
            self.by_keys.setdefault(layout.keys, []).append((algorithm, layout))
        own = {key for keys in self.by_keys for key in keys} | EXTRA
        self.suffixes = {**SPELLINGS, **{key: key for key in own}}  # of a key: the canonical one


def split(key: str, suffixes: Mapping[str, str]) -> tuple[str, str] | None:
    """(stem, suffix as it stands there) by the longest suffix of up to three words that is known; None without one.

    Both "name.lora_A.weight" and "name.lora_A.default.weight" are read, the name of a PEFT adapter cut out; and so is
    "name_lora.down.weight", as diffusers once wrote it.
    """
    words = key.split(".")
    if len(words) > 3 and words[-3] in _NAMED and words[-1] in ("weight", "bias"):
        return ".".join(words[:-3]), f"{words[-3]}.{words[-1]}"
    if len(words) > 2 and words[-3].endswith("_lora") and words[-2] in ("down", "up") and words[-1] == "weight":
        return ".".join([*words[:-3], words[-3].removesuffix("_lora")]), f"lora.{words[-2]}.weight"
    for count in (3, 2, 1):  # "lora_linear_layer.down.weight" is the longest
        if len(words) > count:
            suffix = ".".join(words[-count:])
            if suffix in suffixes:
                return ".".join(words[:-count]), suffix
    if len(words) > 2 and words[-2] in _NAMED_LAST:
        return ".".join(words[:-2]), words[-2]
    return None
