"""`convert`: an adapter file of one dialect as one of another, and adapters of one algorithm as those of another, layer
by layer, with or without the base.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from nerine.algorithms import Algorithm
from nerine.errors import OptionError, shown
from nerine.files.checkpoint import Layer
from nerine.files.reports import LoadReport, SaveReport
from nerine.tables import table
from nerine.tools.adapter_file import Form, Given, given, laid, output_dialect, written
from nerine.tools.exact import brought, kept_dtype
from nerine.tools.output import check_output
from nerine.tools.progress import Progress, silent
from nerine.tools.recast import RecastRow, Wanted, recast, totals, wanted
from nerine.tools.shelf import Shelf, open_shelf
from nerine.tools.weights import no_base

__all__ = ["ConvertReport", "convert"]


@dataclass(frozen=True)
class ConvertReport:
    """What was read, what was written, and what became of each layer where the algorithm was to change.

    `worst` is the largest relative error |ΔW' - ΔW| / |ΔW| of a layer and `error` that of all layers together, before
    numbers are rounded to the format of the file. `rows` is empty where only the dialect changed.
    """

    read: LoadReport
    written: SaveReport
    rows: tuple[RecastRow, ...] = ()
    worst: float = 0.0
    error: float = 0.0
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "read": self.read.to_dict()}

    def __str__(self) -> str:
        skipped = [f"not used: {shown(key)}: {why}" for key, why in self.read.unmatched.items()]
        lines = [f"{self.read.file} ({self.read.dialect}) ->"]
        if self.rows:
            head = ("layer", "was", "rank", "is", "rank ", "how", "error", "note")
            lines.append(table(head, [_shown(row) for row in self.rows]))
            counts = {how: sum(row.method == how for row in self.rows) for how in ("exact", "fitted", "kept")}
            lines.append(
                f"{', '.join(f'{count} {how}' for how, count in counts.items() if count)}; relative error of the "
                f"change: {self.error:.2g} in all, {self.worst:.2g} at worst"
            )
        lines.append(f"{self.written}{' (dry run: not written)' if self.dry_run else ''}")
        return "\n".join([*lines, *skipped, *self.read.notes])


def _shown(row: RecastRow) -> tuple[object, ...]:
    ranks = ["" if rank is None else rank for rank in (row.rank_before, row.rank)]
    error = "" if row.method == "kept" else f"{row.error:.2g}"
    return (shown(row.layer), row.before, ranks[0], row.after, ranks[1], row.method, error, row.note)


def convert(
    file: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dialect: str | None = None,
    to: str | None = None,
    rank: int | None = None,
    tol: float | None = None,
    dora: bool = True,
    settings: Mapping[str, Any] | None = None,
    base: str | os.PathLike[str] | nn.Module | None = None,
    source_dialect: str | None = None,
    component: str | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    hashes: bool = False,
    allow_pickle: bool = False,
    algorithms: Sequence[type[Algorithm]] = (),
    device: str | torch.device = "cpu",
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> ConvertReport:
    """Write the adapters of `file` to `target` in another dialect, as another algorithm, or both; a layer at a time.

    Between dialects each layer is written exactly or not at all. `to` is an algorithm ("lora", "lokr", "full", ...):
    what is a low-rank product becomes one exactly (LoHa of rank r a LoRA of r², LoKr, Tucker, T-LoRA, GLoRA), and any
    adapter a full difference; otherwise the other algorithm is fitted, of a `rank`, or for LoRA of the least rank that
    keeps the relative error `tol` of the change. `settings` are more of its settings. DoRA stays around what can be in
    it, with its magnitudes; `dora=False` multiplies it in. Normalisation layers stay as they are.

    `base` is the checkpoint or the model (any device, "meta" included where no numbers are needed) that the adapters
    are for: it settles names that have lost their dots, and gives the weights on which some adapters and dialects
    depend. `dtype` casts the tensors (None: as they are). Other metadata of the file is kept.

    Raises:
        FormatError: the file cannot be read, the dialect cannot hold a layer exactly, a name cannot be taken apart, or
            a weight is needed and there is no `base`.
        OptionError: an unknown dialect, algorithm, setting or dtype, a layer that can only be fitted while neither
            `rank` nor `tol` is given, or a target that exists and `force` is not set.
    """
    want = _wanted(dialect, to, rank, tol, dora, settings)
    inputs = [file, *([base] if isinstance(base, str | os.PathLike) else [])]
    place = check_output(target, inputs, force)
    options = {"dialect": source_dialect, "component": component, "allow_pickle": allow_pickle}
    with (
        given(file, base, algorithms=algorithms, **options) as found,  # type: ignore[arg-type]
        open_shelf(None if dry_run or want is None else place) as shelf,
    ):
        chosen = output_dialect(dialect, found.read)
        form = Form(chosen, dtype, component, dict(metadata or {}), hashes, "algorithms" if want else "")
        layers: Mapping[str, Layer] = found.read.layers
        rows: list[RecastRow] = []
        if want is not None:
            layers, rows = _recast(found, want, shelf, dtype, device, progress)
        out = laid(layers, found.read, form, found.sites)
        saved = written(place, out, dry_run=dry_run, progress=silent if want else progress)
    worst, error = totals(rows)
    return ConvertReport(found.read.report, saved, tuple(rows), worst, error, dry_run)


def _wanted(
    dialect: str | None,
    to: str | None,
    rank: int | None,
    tol: float | None,
    dora: bool,
    settings: Mapping[str, Any] | None,
) -> Wanted | None:
    if to is not None:
        return wanted(to, rank, tol, dora, settings)
    if rank is not None or tol is not None or settings or not dora:
        raise OptionError("a rank, tol, settings and dora=False are about another algorithm; say which with `to`")
    if dialect is None:
        raise OptionError("nothing to convert to: give a dialect, an algorithm (`to`), or both")
    return None


def _recast(
    found: Given,
    want: Wanted,
    shelf: Shelf,
    dtype: torch.dtype | None,
    device: str | torch.device,
    progress: Progress,
) -> tuple[dict[str, Layer], list[RecastRow]]:
    layers: dict[str, Layer] = {}
    rows = []
    for number, (path, layer) in enumerate(found.read.layers.items()):
        progress(number, len(found.read.layers), path)
        record, row = recast(path, brought(layer, path, device), layer.base, want)
        rows.append(row)
        if row.method == "kept":
            layers[path] = layer
            continue
        if layer.finish is not None:
            raise no_base(path, "what it is in full")
        layers[path] = shelf.layer(path, record, kept_dtype(layer, dtype), layer.base)
    progress(len(rows), len(rows), "")
    return layers, rows
