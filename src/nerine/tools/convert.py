"""`convert`: a file of one dialect as one of another, layer by layer, with or without the model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from nerine.algorithms import Algorithm
from nerine.errors import FormatError, OptionError
from nerine.files.checkpoint import Base, Checkpoint, Layer, Record
from nerine.files.detect import dialect_named
from nerine.files.dialects.base import EMBEDDINGS, Dialect
from nerine.files.folder import open_adapter, write
from nerine.files.meta import write_meta
from nerine.files.reading import read_checkpoint
from nerine.files.reports import LoadReport, SaveReport
from nerine.files.resolve import component_of
from nerine.files.store import Outgoing
from nerine.files.writing import lay_out
from nerine.model.mount import Spot, bias_at, weight_at
from nerine.model.targets import every_spot, spot_at
from nerine.version import __version__

__all__ = ["ConvertReport", "convert"]

DTYPES = (None, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ConvertReport:
    """What was read, and what was written."""

    read: LoadReport
    written: SaveReport

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        skipped = [f"not used: {key}: {why}" for key, why in self.read.unmatched.items()]
        return "\n".join([f"{self.read.file} ({self.read.dialect}) ->", str(self.written), *skipped, *self.read.notes])


def convert(
    file: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dialect: str,
    source_dialect: str | None = None,
    model: nn.Module | None = None,
    component: str | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    hashes: bool = False,
    allow_pickle: bool = False,
    algorithms: Sequence[type[Algorithm]] = (),
) -> ConvertReport:
    """Write the adapters of `file` to `target` in another dialect, a layer at a time and each exactly or not at all.

    Names that have lost their dots are taken apart by the words that models are made of; `model` (any device, "meta"
    included) settles those that cannot be, and its weights those dialects whose numbers depend on them. `dtype` casts
    the tensors (None: as they are). Other metadata of the file is kept. `target` may be `file` itself.

    Raises:
        FormatError: the file cannot be read, the dialect cannot hold a layer exactly, a name cannot be taken apart, or
            weights are needed and there is no `model`.
        OptionError: an unknown dialect or dtype.
    """
    chosen = dialect_named(dialect)
    if dtype not in DTYPES:
        raise OptionError(f"dtype must be torch.float32, float16, bfloat16 or None, got {dtype!r}")
    spots = {} if model is None else every_spot(model)
    sites = None if model is None else {path: spot.site for path, spot in spots.items()}
    with open_adapter(file, allow_pickle=allow_pickle) as source:
        read = read_checkpoint(source, sites, dialect=source_dialect, component=component, others=algorithms)
        if model is None:
            layers, component = _alone(read, chosen, component)
        else:
            layers = {path: _beside(layer, spot_at(spots, path)) for path, layer in read.layers.items()}
        written = lay_out(layers, chosen, sites=sites, dtype=dtype, component=component)
        told = {path: layer.algorithm for path, layer in layers.items() if path in read.meta.layers}
        kept = {key: value for key, value in read.meta.other.items() if key not in ("format", "lora_adapter_metadata")}
        meta = write_meta(told, __version__, {**written.header, **kept, **(metadata or {})}, chosen.name)
        tensors = [*written.tensors, *_embeddings(read, chosen)]
        size = write(target, chosen, tensors, meta, written.config, hashes)
    saved = SaveReport(os.fspath(target), chosen.name, len(layers), len(tensors), size)
    return ConvertReport(read.report, saved)


def _embeddings(read: Checkpoint, chosen: Dialect) -> list[Outgoing]:
    """The textual inversions that the file carries, as they are; a folder has no room for them."""
    if read.embeddings and chosen.folder:
        raise FormatError(
            f"{read.report.file}: it carries embeddings, for which the {chosen.name} dialect has no place"
        )
    return [
        Outgoing(f"{EMBEDDINGS}{word}.{name}", piece.shape, piece.dtype, piece.read)
        for word, own in read.embeddings.items()
        for name, piece in own.items()
    ]


def _alone(read: Checkpoint, chosen: Dialect, component: str | None) -> tuple[dict[str, Layer], str | None]:
    """Layers without a model; where all are of one part of a pipeline, without its name before theirs."""
    waiting = [path for path, layer in read.layers.items() if layer.finish is not None]
    if waiting and chosen.name != read.report.dialect:
        raise FormatError(
            f"{read.report.file}: {len(waiting)} layers (first {waiting[0]}) can be read only beside the weights that "
            "they are for: give the model"
        )
    if read.flat and not chosen.flat:
        raise FormatError(
            f"{read.report.file}: {len(read.flat)} names (first {read.flat[0]}) cannot be taken apart without the "
            f"model, and the {chosen.name} dialect has dots in its names: give the model"
        )
    tops = {path.split(".", 1)[0] if "." in path else "" for path in read.layers}
    parts = {component_of(top) for top in tops}
    if len(parts) == 1 and "" not in parts:
        (part,) = parts
        return {path.split(".", 1)[1]: layer for path, layer in read.layers.items()}, component or part
    return dict(read.layers), component


def _beside(layer: Layer, spot: Spot) -> Layer:
    """A layer with the weight of the model beside it."""

    def weight() -> torch.Tensor:
        found = weight_at(spot.holder, spot).detach()
        if found.is_meta:
            raise FormatError(f"{spot.path}: its weight is needed, and the model has none (it is on meta)")
        return found.cpu()

    def bias() -> torch.Tensor | None:
        found = bias_at(spot.holder, spot)
        return None if found is None else found.detach().cpu()

    layer = replace(layer, base=Base(weight, bias))
    finish = layer.finish
    if finish is None:
        return layer
    raw = layer

    def finished() -> Record:
        return finish(raw.record(), weight(), bias())

    found = finished()  # what it becomes is known only beside the weight
    return replace(
        raw,
        algorithm=found.algorithm,
        shapes={name: tuple(t.shape) for name, t in found.params.tensors.items()},
        dtypes={name: t.dtype for name, t in found.params.tensors.items()},
        scale=found.params.scale,
        load=lambda: finished().params,
        finish=None,
    )
