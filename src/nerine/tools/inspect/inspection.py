"""`inspect`: what is in an adapter file, layer by layer, and what looks wrong."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from nerine.algorithms import Algorithm, DoRA
from nerine.errors import shown
from nerine.files.checkpoint import Checkpoint, Layer
from nerine.files.folder import CONFIG, open_adapter
from nerine.files.names import flatten
from nerine.files.pickles import is_safetensors
from nerine.files.reports import LoadRow
from nerine.files.store import Source
from nerine.tools.inspect.measure import measure
from nerine.tools.inspect.places import order_of, spot_of
from nerine.tools.inspect.reading import read_what_is_whole
from nerine.tools.inspect.report import Finding, InspectReport, LayerRow
from nerine.tools.inspect.suspicion import suspicious
from nerine.tools.inspect.training import read_training
from nerine.tools.progress import Progress, silent
from nerine.tools.weights import open_weights

__all__ = ["inspect"]


def inspect(
    file: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    allow_pickle: bool = False,
    dialect: str | None = None,
    progress: Progress = silent,
    device: str | torch.device = "cpu",
) -> InspectReport:
    """What is in an adapter file, with the measures of every layer, of which one at a time is in memory.

    With `base`, a checkpoint of the model that it is for, changes are measured against the weights, and those that
    depend on the weight (DoRA, rotations, multipliers, GLoRA) are the true ones. Layers that cannot be read are
    findings, and the others are measured all the same.

    Raises:
        FormatError: nothing of the file can be read, or it does not belong to the base.
        OptionError: there is no such dialect.
    """
    with ExitStack() as stack:
        source = stack.enter_context(open_adapter(file, allow_pickle=allow_pickle))
        weights = None if base is None else stack.enter_context(open_weights(base, allow_pickle=allow_pickle))
        read, left_out, keys = read_what_is_whole(source, weights, dialect)
        told = {row.layer: row for row in read.report.rows}
        rows = []
        for done, (path, layer) in enumerate(read.layers.items()):
            progress(done, len(read.layers), path)
            rows.append(_row(path, layer, told.get(shown(path)), device))
        progress(len(read.layers), len(read.layers), "")
        rows.sort(key=lambda row: order_of(row.spot, row.layer))
        damaged = tuple(Finding(name, "damaged", why) for name, why in left_out.items())
        return _report(source, Path(file), read, tuple(rows), damaged, keys, base)


def _report(
    source: Source,
    file: Path,
    read: Checkpoint,
    rows: tuple[LayerRow, ...],
    damaged: tuple[Finding, ...],
    keys: Mapping[str, str],
    base: str | os.PathLike[str] | None,
) -> InspectReport:
    dtypes: dict[str, int] = {}
    for key in source.keys:
        name = str(source.dtype(key)).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + 1
    meta, container = read.meta, _container(source.path)
    written_by = f"nerine {shown(meta.version, 40)}, semantics {meta.semantics}" if meta.version else ""
    beside = source.path.with_name(CONFIG) if file.is_dir() else None
    size = source.path.stat().st_size + (beside.stat().st_size if beside is not None and beside.is_file() else 0)
    notes = read.report.notes
    for lacking in dict.fromkeys(row.lacking for row in rows if row.lacking):
        count = sum(row.lacking == lacking for row in rows)
        notes = (*notes, f"{count} layers are shown in part: {lacking}")
    if rows and all("no alpha in the file" in row.note for row in rows):
        notes = (*notes, "no alpha in the file: read as the rank, so that the scale is 1")
    return InspectReport(
        file=os.fspath(file),
        container=f"folder, {container}" if file.is_dir() else container,
        bytes=size,
        dialect=read.report.dialect,
        scores=dict(read.report.scores),
        rows=rows,
        findings=(*damaged, *suspicious(rows)),
        unmatched={**read.report.unmatched, **keys},
        embeddings={word: {name: piece.shape for name, piece in own.items()} for word, own in read.embeddings.items()},
        dtypes=dtypes,
        training=read_training(source.metadata, source.config),
        settings=tuple(dict.fromkeys(str(algorithm) for algorithm in meta.layers.values())),
        written_by=written_by,
        metadata=dict(source.metadata),
        base="" if base is None else os.fspath(base),
        missing=tuple(path for path in read.report.missing if not _is_among(path, damaged)),
        notes=notes,
    )


def _is_among(path: str, damaged: tuple[Finding, ...]) -> bool:
    """Whether a layer is there after all, only damaged."""
    return any(flatten(finding.layer).endswith(flatten(path)) for finding in damaged)


def _container(file: Path) -> str:
    with open(file, "rb") as stream:
        return "safetensors" if is_safetensors(stream.read(9)) else "pickle"


def _row(path: str, layer: Layer, told: LoadRow | None, device: str | torch.device) -> LayerRow:
    spot = spot_of(path)
    algorithm = layer.algorithm
    rank = _rank_of(layer)
    is_scaled = algorithm.layout_of(layer.shapes).alpha == "scale"
    formats = list(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in layer.dtypes.values()))
    found = measure(layer, device)
    return LayerRow(
        layer=path,
        component=spot.component,
        block=spot.block,
        kind=spot.kind,
        algorithm=_name_of(algorithm),
        shape=layer.site.shape if layer.base is not None or found.spectral is not None else (),
        parameters=sum(math.prod(shape) for shape in layer.shapes.values()),
        dtype=", ".join(formats),
        rank=rank,
        alpha=round(layer.scale * rank, 6) if rank is not None and is_scaled else None,
        scale=layer.scale,
        axis=algorithm.axis if isinstance(algorithm, DoRA) else "",
        note="" if told is None else told.note,
        **asdict(found),
    )


def _rank_of(layer: Layer) -> int | None:
    """The rank that tensors of a layer have; None where none has any."""
    layout = layer.algorithm.layout_of(layer.shapes)
    lead = 1 if layer.site.experts else 0
    for name, spec in layout.specs.items():
        if "rank" in spec.words:
            return layer.shapes[name][lead + spec.words.index("rank")]
    return None


def _name_of(algorithm: Algorithm) -> str:
    inside = f"({_name_of(algorithm.inner)})" if isinstance(algorithm, DoRA) else ""
    return type(algorithm).__name__ + inside
