"""The one form that adapters have between a file and a model: layers by path, each brought into memory when asked for.

A `Layer` knows everything about its adapter that the shapes tell; its tensors are read, changed into the canonical form
and forgotten again one layer at a time, so that the memory a conversion needs does not grow with the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nerine.algorithms import Algorithm, Params, Shape
from nerine.files.meta import Meta
from nerine.files.pieces import Piece
from nerine.files.reports import LoadReport
from nerine.site import Site

__all__ = ["Base", "Checkpoint", "Finish", "Layer", "Record", "joined", "of_record"]


@dataclass(frozen=True)
class Record:
    """The adapter of one layer in memory: algorithm, shape of the layer, and tensors in canonical names and shapes."""

    algorithm: Algorithm
    site: Site
    params: Params


class Base(NamedTuple):
    """Weight `[out, in, *k]` and bias of a layer, for whoever asks for them."""

    weight: Callable[[], Tensor]
    bias: Callable[[], Tensor | None]

    def rows(self, start: int, stop: int) -> Base:
        """That of some rows of the layer."""

        def bias() -> Tensor | None:
            whole = self.bias()
            return None if whole is None else whole[start:stop]

        return Base(lambda: self.weight()[start:stop], bias)


def _stacked(bases: Sequence[Base]) -> Base:
    """The base of a layer that is these, one above the other."""

    def bias() -> Tensor | None:
        found = [base.bias() for base in bases]
        return None if any(b is None for b in found) else torch.cat([b for b in found if b is not None])

    return Base(lambda: torch.cat([base.weight() for base in bases]), bias)


Finish = Callable[[Record, Tensor, Tensor | None], Record]
"""What can be worked out only beside the layer: a record, the weight `[out, in, *k]` and the bias in, a record out."""


@dataclass(frozen=True)
class Layer:
    """The adapter of one layer, not yet in memory.

    `load` brings its tensors, in the number format in which they are kept. `finish` completes them from the weight of
    the layer, where the file leaves something to be worked out. `base` gives that weight and the bias, where they are
    at hand.
    """

    algorithm: Algorithm
    site: Site
    shapes: Mapping[str, Shape]
    scale: float
    load: Callable[[], Params]
    finish: Finish | None = None
    base: Base | None = None
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)  # fp32 where nothing else is said

    def record(self) -> Record:
        """The adapter with its tensors."""
        return Record(self.algorithm, self.site, self.load())

    def sketch(self) -> Record:
        """The adapter with tensors that have shapes and no values, to learn what a change makes of them."""
        dtypes = dict.fromkeys(self.shapes, torch.float32) | dict(self.dtypes)
        shapes = {n: torch.empty(shape, dtype=dtypes[n], device="meta") for n, shape in self.shapes.items()}
        return Record(self.algorithm, self.site, Params(shapes, self.scale))

    def changed(self, change: Callable[[Record], Record]) -> Layer:
        """This layer as `change` makes it, which is asked for shapes first and for values when they are needed."""
        return replace(self, **_known(change(self.sketch())), load=lambda: change(self.record()).params)


def _known(record: Record) -> dict[str, Any]:
    """What a layer knows without its values."""
    tensors = record.params.tensors
    return {
        "algorithm": record.algorithm,
        "site": record.site,
        "shapes": {name: tuple(t.shape) for name, t in tensors.items()},
        "scale": record.params.scale,
        "dtypes": {name: t.dtype for name, t in tensors.items()},
    }


def of_record(record: Record, base: Base | None = None) -> Layer:
    """A layer whose tensors are in memory already."""
    return Layer(**_known(record), load=lambda: record.params, base=base)


def joined(layers: Sequence[Layer | None], join: Callable[[list[Record | None]], Record]) -> Layer:
    """One layer that `join` makes of several, the first rows first; some may be missing."""
    known = _known(join([None if layer is None else layer.sketch() for layer in layers]))
    bases = [layer.base for layer in layers if layer is not None and layer.base is not None]
    return Layer(
        **known,
        load=lambda: join([None if layer is None else layer.record() for layer in layers]).params,
        base=_stacked(bases) if len(bases) == len(layers) else None,
    )


@dataclass(frozen=True)
class Checkpoint:
    """Layers by path, what the file said of itself, and the report of reading it.

    `embeddings` are the tensors of textual inversions that the file carries, by trigger word and name. `flat` are
    the layers whose names have lost their dots, where no model was at hand to find them.
    """

    layers: Mapping[str, Layer]
    meta: Meta
    report: LoadReport
    embeddings: Mapping[str, Mapping[str, Piece]] = field(default_factory=dict)
    flat: tuple[str, ...] = ()
