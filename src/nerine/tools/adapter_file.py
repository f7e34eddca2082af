"""Adapter files as tools read and write them: with or without the base, in whichever dialect, or only as if.

The layers of a file whose base is not at hand go by the names that the file gives them; where all are of one part of a
pipeline, without that part before them, as a model of that part would have it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from nerine.algorithms import Algorithm
from nerine.errors import FormatError, OptionError
from nerine.files.checkpoint import Base, Checkpoint, Layer
from nerine.files.detect import dialect_named
from nerine.files.dialects.base import EMBEDDINGS, Dialect
from nerine.files.folder import open_adapter, write
from nerine.files.header import place, render_header
from nerine.files.meta import write_meta
from nerine.files.reading import read_checkpoint
from nerine.files.reports import SaveReport
from nerine.files.resolve import component_of
from nerine.files.store import Outgoing
from nerine.files.writing import Written, lay_out
from nerine.model.mount import Spot, bias_at, weight_at
from nerine.model.targets import every_spot, spot_at
from nerine.site import Site
from nerine.tools.progress import Progress, silent
from nerine.tools.weights import Weights, beside, open_weights, read_adapter
from nerine.version import __version__

__all__ = ["DTYPES", "Form", "Given", "Laid", "alone", "given", "laid", "output_dialect", "written"]

DTYPES = (None, torch.float32, torch.float16, torch.bfloat16)
PathLike = str | os.PathLike[str]
# What the header of a file says of tensors that are now others.
_STALE = ("ss_network_dim", "ss_network_alpha", "ss_network_args")
_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


# -- in ----------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Given:
    """An adapter file that is open: its layers, and those of its base, where one was given."""

    read: Checkpoint
    sites: Mapping[str, Site] | None = None


@contextmanager
def given(
    file: PathLike,
    base: PathLike | nn.Module | Weights | None = None,
    *,
    dialect: str | None = None,
    component: str | None = None,
    allow_pickle: bool = False,
    algorithms: Sequence[type[Algorithm]] = (),
) -> Iterator[Given]:
    """Open an adapter and its base: a checkpoint, a live model, or nothing.

    Raises:
        FormatError: one of them cannot be read, or nothing in the adapter belongs to the base.
    """
    with open_adapter(file, allow_pickle=allow_pickle) as source:
        if isinstance(base, nn.Module):
            spots = every_spot(base)
            sites = {path: spot.site for path, spot in spots.items()}
            found = read_checkpoint(source, sites, dialect=dialect, component=component, others=algorithms)
            layers = {path: beside(layer, _live(spot_at(spots, path))) for path, layer in found.layers.items()}
            yield Given(_with(found, layers), sites)
        elif isinstance(base, Weights) or base is None:
            found = read_adapter(source, base, dialect=dialect, component=component, algorithms=algorithms)
            yield Given(found, None if base is None else base.sites)
        else:
            with open_weights(base, allow_pickle=allow_pickle) as weights:
                found = read_adapter(source, weights, dialect=dialect, component=component, algorithms=algorithms)
                yield Given(found, weights.sites)


def _with(found: Checkpoint, layers: Mapping[str, Layer]) -> Checkpoint:
    return Checkpoint(layers, found.meta, found.report, found.embeddings, found.flat)


def _live(spot: Spot) -> Base:
    """The weight and bias of a layer of a live model."""

    def weight() -> torch.Tensor:
        found = weight_at(spot.holder, spot).detach()
        if found.is_meta:
            raise FormatError(f"{spot.path}: its weight is needed, and the model has none (it is on meta)")
        return found.cpu()

    def bias() -> torch.Tensor | None:
        found = bias_at(spot.holder, spot)
        return None if found is None else found.detach().cpu()

    return Base(weight, bias)


def output_dialect(name: str | None, read: Checkpoint) -> Dialect:
    """The dialect of that name, or that of what was read."""
    return dialect_named(read.report.dialect if name is None else name)


# -- out ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Form:
    """How an adapter is to be written. `changed` says what is other than it was read: "", "ranks" or "algorithms"."""

    dialect: Dialect
    dtype: torch.dtype | None = None
    component: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    hashes: bool = False
    changed: Literal["", "ranks", "algorithms"] = ""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise OptionError(f"dtype must be torch.float32, float16, bfloat16 or None, got {self.dtype!r}")


@dataclass(frozen=True)
class Laid:
    """A file that is ready to be written: layers and tensors, metadata, and the bytes that it will have."""

    form: Form
    layers: int
    tensors: tuple[Outgoing, ...]
    metadata: Mapping[str, str]
    written: Written

    @property
    def bytes(self) -> int:
        entries = place(((o.key, tuple(o.shape), o.dtype) for o in self.tensors), "")
        data = max((entry.end for entry in entries.values()), default=0)
        return len(render_header(entries, self.metadata, "")) + data


def laid(layers: Mapping[str, Layer], read: Checkpoint, form: Form, sites: Mapping[str, Site] | None = None) -> Laid:
    """Layers (by the paths under which they were read) as a file of a dialect.

    Raises:
        FormatError: the dialect cannot hold one of them, or there is no name for it without the model.
    """
    component, told = form.component, read.meta.layers
    if sites is None:
        layers, component = alone(layers, read, form.dialect, component)
    known = {path: layer.algorithm for path, layer in layers.items() if path in told or sites is not None}
    found = lay_out(layers, form.dialect, sites=sites, dtype=form.dtype, component=component)
    kept = {key: value for key, value in read.meta.other.items() if key not in ("format", "lora_adapter_metadata")}
    header = {**found.header, **kept}
    if form.changed:
        stale = {*_STALE, *_HASHES, *(["ss_network_module"] if form.changed == "algorithms" else [])}
        header = {key: value for key, value in header.items() if key not in stale}
        header.update({key: value for key, value in found.header.items() if key in stale})
    meta = write_meta(known, __version__, {**header, **form.metadata}, form.dialect.name)
    tensors = (*found.tensors, *_embeddings(read, form.dialect))
    return Laid(form, len(layers), tensors, meta, found)


def written(target: PathLike, file: Laid, *, dry_run: bool = False, progress: Progress = silent) -> SaveReport:
    """Write a file that was laid out; in a dry run only say what it would be."""
    dialect, config = file.form.dialect, file.written.config
    tensors = [_told(o, i, len(file.tensors), progress) for i, o in enumerate(file.tensors)]
    size = file.bytes if dry_run else write(target, dialect, tensors, file.metadata, config, file.form.hashes)
    return SaveReport(os.fspath(Path(target)), dialect.name, file.layers, len(file.tensors), size, file.written.notes)


def _told(o: Outgoing, number: int, total: int, progress: Progress) -> Outgoing:
    """A tensor that says so when its turn comes."""

    def make() -> torch.Tensor:
        progress(number, total, o.key)
        return o.make()

    return o._replace(make=make)


def _embeddings(read: Checkpoint, chosen: Dialect) -> Iterable[Outgoing]:
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


def alone(
    layers: Mapping[str, Layer], read: Checkpoint, chosen: Dialect, component: str | None
) -> tuple[dict[str, Layer], str | None]:
    """Layers without a model; where all are of one part of a pipeline, without its name before theirs."""
    waiting = [path for path, layer in layers.items() if layer.finish is not None]
    if waiting and chosen.name != read.report.dialect:
        raise FormatError(
            f"{read.report.file}: {len(waiting)} layers (first {waiting[0]}) can be read only beside the weights that "
            "they are for: give the base"
        )
    flat = [path for path in read.flat if path in layers]
    if flat and not chosen.flat:
        raise FormatError(
            f"{read.report.file}: {len(flat)} names (first {flat[0]}) cannot be taken apart without the "
            f"model, and the {chosen.name} dialect has dots in its names: give the base"
        )
    tops = {path.split(".", 1)[0] if "." in path else "" for path in layers}
    parts = {component_of(top) for top in tops}
    if len(parts) == 1 and "" not in parts:
        (part,) = parts
        return {path.split(".", 1)[1]: layer for path, layer in layers.items()}, component or part
    return dict(layers), component
