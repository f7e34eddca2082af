"""`resize`: the adapters of a file with fewer ranks, by a number, a share of the energy, or the size of the file.

Low-rank adapters are cut down in their factors; of a LoHa, whose ranks have no order, the nearest of fewer is fitted.
What has no rank stays as it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nerine.algorithms import Algorithm, DoRA, GLoRA, LoHa, Norm, Params
from nerine.errors import NerineError, OptionError, shown
from nerine.files.checkpoint import Base, Layer, Record
from nerine.files.reports import LoadReport, SaveReport
from nerine.ops.factored import squares
from nerine.ops.precision import wide
from nerine.tables import table
from nerine.tools.adapter_file import Form, Given, Laid, given, laid, output_dialect, written
from nerine.tools.exact import around, brought, change_in, inside, kept_dtype, kind_of, rank_in
from nerine.tools.ordered import Ordered, beginning, ordered, why_not
from nerine.tools.output import check_output
from nerine.tools.progress import Progress, silent
from nerine.tools.ranks import Choice, shares
from nerine.tools.shelf import Shelf, open_shelf, sketched
from nerine.tools.weights import no_base

__all__ = ["ResizeReport", "ResizeRow", "resize"]

ROUNDS = 8  # of fitting a file into its size


@dataclass(frozen=True)
class ResizeRow:
    """What became of one layer: ranks, and the relative error of the change (of what DoRA is around; `energy` is the
    share of Σσ² that is kept). `rank` is None where there is none, `note` says why a layer stayed as it was."""

    layer: str
    before: str
    rank_before: int | None
    after: str
    rank: int | None
    error: float = 0.0
    size: float = 0.0
    note: str = ""

    @property
    def energy(self) -> float:
        return 1 - self.error**2


@dataclass(frozen=True)
class ResizeReport:
    """What was read, what became of each layer, and what was written. `error` is the relative error of all layers that
    have ranks together, `worst` that of one; both before numbers are rounded to the format of the file."""

    read: LoadReport
    written: SaveReport
    rows: tuple[ResizeRow, ...]
    bytes_before: int
    dry_run: bool = False

    @property
    def error(self) -> float:
        whole = sum(row.size**2 for row in self.rows)
        return (sum((row.error * row.size) ** 2 for row in self.rows) / whole) ** 0.5 if whole else 0.0

    @property
    def worst(self) -> float:
        return max((row.error for row in self.rows), default=0.0)

    @property
    def ranks(self) -> tuple[int, int]:
        """The sums of all ranks, before and after."""
        return sum(row.rank_before or 0 for row in self.rows), sum(row.rank or 0 for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        rows = [{**asdict(row), "energy": row.energy} for row in self.rows]
        own = {"error": self.error, "energy": 1 - self.error**2, "worst": self.worst, "ranks": self.ranks}
        return {**asdict(self), **own, "rows": rows, "read": self.read.to_dict()}

    def __str__(self) -> str:
        head = ("layer", "was", "rank", "is", "rank ", "error", "energy kept", "note")
        skipped = [f"not used: {shown(key)}: {why}" for key, why in self.read.unmatched.items()]
        before, after = self.ranks
        return "\n".join(
            [
                table(head, [_shown(row) for row in self.rows]),
                f"ranks in all: {before} -> {after}; bytes: {self.bytes_before:,} -> {self.written.bytes:,}; relative "
                f"error of the change: {self.error:.2g} in all, {self.worst:.2g} at worst; energy kept: "
                f"{1 - self.error**2:.2%}",
                f"{self.written}{' (dry run: not written)' if self.dry_run else ''}",
                *skipped,
                *self.read.notes,
            ]
        )


def _shown(row: ResizeRow) -> tuple[object, ...]:
    ranks = ["" if rank is None else rank for rank in (row.rank_before, row.rank)]
    is_cut = row.rank is not None and row.rank != row.rank_before
    figures = (f"{row.error:.2g}", f"{row.energy:.1%}") if is_cut else ("", "")
    return (shown(row.layer), row.before, ranks[0], row.after, ranks[1], *figures, row.note)


def resize(
    file: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    rank: int | None = None,
    conv_rank: int | None = None,
    energy: float | None = None,
    size: int | None = None,
    method: str | None = None,
    param: float | None = None,
    base: str | os.PathLike[str] | nn.Module | None = None,
    dialect: str | None = None,
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
) -> ResizeReport:
    """Write the adapters of `file` to `target` with fewer ranks, each the best of its number; a layer at a time.

    `rank` is the number (`conv_rank` that of layers with a kernel), `energy` the share of Σσ² to keep of each layer,
    `size` the bytes of the file, shared out so that the squared error over all layers is least, and `method` with
    `param` one of sd-scripts' rules ("sv_ratio", "sv_fro", "sv_cumulative"); beside the last three, `rank` is the most
    that a layer may keep. A rank that is there already, or more, changes nothing.

    With the `base`, DoRA's magnitudes are fitted to the smaller adapter, and GLoRA is cut as it acts. Only for
    T-LoRA without its beginnings and ComfyUI's DoRA it is needed.

    Raises:
        FormatError: the file cannot be read, or a weight is needed and there is no `base`.
        OptionError: no rule or several of them, a value out of range, a size that cannot be reached, or a target that
            exists and `force` is not set.
    """
    choice = Choice(rank, conv_rank, energy, size, method, param)
    inputs = [file, *([base] if isinstance(base, str | os.PathLike) else [])]
    place = check_output(target, inputs, force)
    options = {"dialect": source_dialect, "component": component, "allow_pickle": allow_pickle}
    with (
        given(file, base, algorithms=algorithms, **options) as found,  # type: ignore[arg-type]
        open_shelf(None if dry_run and size is None else place) as shelf,
    ):
        chosen = output_dialect(dialect, found.read)
        form = Form(chosen, dtype, component, dict(metadata or {}), hashes, "ranks")
        job = _Job(found, form, choice, device, shelf, progress)
        rows, out = job.run()
        saved = written(place, out, dry_run=dry_run)
    return ResizeReport(found.read.report, saved, tuple(rows), _bytes_of(Path(file)), dry_run)


def _bytes_of(file: Path) -> int:
    files = [p for p in file.iterdir() if p.is_file()] if file.is_dir() else [file]
    return sum(p.stat().st_size for p in files)


class _Held(NamedTuple):
    """An adapter in order that is put aside until its rank is known; no tensor of it is in memory, for small ones that
    stay would keep the memory of large ones that go from being given back."""

    layer: Layer
    values: list[float]
    side: int
    scale: float

    def ordered(self, path: str, device: str | torch.device) -> Ordered:
        record = brought(self.layer, path, device)
        like = next(iter(record.params.tensors.values()))
        return Ordered(record, like.new_tensor(self.values), self.side, self.scale)


class _Job:
    """One file being resized."""

    def __init__(
        self,
        found: Given,
        form: Form,
        choice: Choice,
        device: str | torch.device,
        shelf: Shelf,
        progress: Progress,
    ) -> None:
        self.found, self.form, self.choice = found, form, choice
        self.device, self.shelf, self.progress = device, shelf, progress
        self.all = found.read.layers
        self.rows: dict[str, ResizeRow] = {}
        self.layers: dict[str, Layer] = {}
        self.held: dict[str, _Held] = {}  # in order, and not cut down yet

    def run(self) -> tuple[list[ResizeRow], Laid]:
        for number, (path, layer) in enumerate(self.all.items()):
            self.progress(number, len(self.all), path)
            self._take(path, layer)
        self.progress(len(self.all), len(self.all), "")
        out = self._fit_in() if self.choice.size is not None else self._laid(self.layers)
        return [self.rows[path] for path in self.all], out

    def _laid(self, layers: Mapping[str, Layer]) -> Laid:
        return laid({path: layers[path] for path in self.all}, self.found.read, self.form, self.found.sites)

    def _take(self, path: str, layer: Layer) -> None:
        """One layer: cut down, fitted, put aside until its rank is known, or left as it is."""
        sketch = layer.sketch()
        own, there = inside(sketch), rank_in(sketch)
        choice = self.choice
        why = why_not(own)
        if isinstance(own.algorithm, LoHa) and not own.site.experts:
            why = "" if choice.by_rank else "a LoHa is resized by rank alone, or converted to a LoRA first"
        most = 0 if there is None else choice.most(bool(own.site.kernel), there)
        if why or (choice.by_rank and most == there):
            note = why or ("" if choice.rank == there else f"it has {there} ranks already")
            self._leave(path, layer, "" if isinstance(own.algorithm, Norm) else note)
            return
        if layer.finish is not None:
            raise no_base(path, "what it is in full")
        record = brought(layer, path, self.device)
        if isinstance(own.algorithm, LoHa):
            self._fit(path, layer, record, most)
            return
        weight = None if layer.base is None else layer.base.weight
        found = ordered(inside(record), weight, path, choice.is_dynamic, choice.by_rank)
        if choice.size is None:
            count = choice.keep(found.s, found.side, bool(own.site.kernel))
            self._cut(path, layer, record, found, min(count, len(found.s)))
        else:
            kept = self.shelf.layer(path, found.record, torch.float32, layer.base)
            self.held[path] = _Held(kept, found.s.tolist(), found.side, found.scale)

    def _leave(self, path: str, layer: Layer, note: str) -> None:
        record = layer.sketch()
        name, rank = kind_of(record.algorithm), rank_in(record)
        self.layers[path] = layer
        self.rows[path] = ResizeRow(path, name, rank, name, rank, note=note)

    def _put(self, path: str, layer: Layer, before: Record, after: Record, error: float, size: float) -> None:
        names = kind_of(before.algorithm), kind_of(after.algorithm)
        self.rows[path] = ResizeRow(path, names[0], rank_in(before), names[1], rank_in(after), error, size)
        self.layers[path] = self.shelf.layer(path, after, kept_dtype(layer, self.form.dtype), layer.base)

    def _cut(self, path: str, layer: Layer, record: Record, found: Ordered, count: int) -> None:
        there = rank_in(record)
        if count >= (there or 0):
            self._leave(path, layer, "")
            self.rows[path] = replace(self.rows[path], size=found.size)
            return
        after = around(record, beginning(found.record, count))
        error, whole = found.lost(count), found.size
        if layer.base is not None and isinstance(inside(record).algorithm, GLoRA):
            error, whole = _measured(inside(record), inside(after), layer.base, path)
        self._put(path, layer, record, _refitted(record, after, layer.base), error, whole)

    def _fit(self, path: str, layer: Layer, record: Record, count: int) -> None:
        """The nearest LoHa of fewer ranks."""
        own = inside(record)
        change = change_in(own, None, path)
        algorithm = LoHa(rank=count)
        try:
            found = Record(algorithm, own.site, algorithm.fit(own.site, torch.zeros_like(change), change))
        except NerineError as error:
            raise type(error)(f"{path}: {error}") from None
        off, size = change_in(found, None, path) - change, float(change.norm())
        after = _refitted(record, around(record, found), layer.base)
        self._put(path, layer, record, after, float(off.norm()) / size if size else 0.0, size)

    # -- into a size ---------------------------------------------------------------------------------------------------
    def _fit_in(self) -> Laid:
        """The ranks for which the file has the size that is wanted, and no more."""
        room = self.choice.size or 0
        paths = list(self.held)
        units = [self._unit(path) for path in paths]
        gains = [squares(torch.tensor(self.held[path].values, dtype=torch.float64)) for path in paths]
        most = [
            self.choice.most(bool(self.held[path].layer.site.kernel), len(g))
            for path, g in zip(paths, gains, strict=True)
        ]
        least = self._sketched(dict.fromkeys(paths, 1)).bytes
        if least > room:
            raise OptionError(
                f"resize: with one rank in each layer the file still has {least:,} bytes, more than the {room:,} that "
                "it may have; convert it to another algorithm, or leave layers out"
            )
        data = room - least + sum(units)
        for _ in range(ROUNDS):
            counts = dict(zip(paths, shares(gains, units, most, data), strict=True))
            over = self._sketched(counts).bytes - room
            if over <= 0:
                break
            data -= over
        else:
            counts = dict.fromkeys(paths, 1)
        for path, count in counts.items():
            layer, whole = self.all[path], self.held[path].ordered(path, self.device)
            self._cut(path, layer, brought(layer, path, self.device), whole, count)
        return self._laid(self.layers)

    def _unit(self, path: str) -> int:
        """Bytes of one rank of a layer."""
        record = self.held[path].layer.sketch()
        specs = record.algorithm.layout_of(record.params.tensors).specs
        ranked = [t for name, t in record.params.tensors.items() if "rank" in specs[name].words]
        width = kept_dtype(self.all[path], self.form.dtype).itemsize
        return sum(t.numel() for t in ranked) * width // len(self.held[path].values)

    def _sketched(self, counts: Mapping[str, int]) -> Laid:
        """The file as it would be, without values."""
        layers = dict(self.layers)
        for path, count in counts.items():
            layer = self.all[path]
            record = around(layer.sketch(), beginning(self.held[path].layer.sketch(), count))
            there = rank_in(layer.sketch()) or 0
            empty = sketched(record, kept_dtype(layer, self.form.dtype), layer.base)
            layers[path] = layer if count >= there else empty
        return self._laid(layers)


def _measured(before: Record, after: Record, base: Base, path: str) -> tuple[float, float]:
    """The relative error of the change, and its size, beside the weight."""
    change = change_in(before, base.weight, path)
    off, size = change_in(after, base.weight, path) - change, float(change.norm())
    return float(off.norm()) / size if size else 0.0, size


@torch.no_grad()
def _refitted(before: Record, after: Record, base: Base | None) -> Record:
    """DoRA's magnitudes for the smaller adapter: of each row (or column) the length with which it comes nearest to what
    it was, m·cos of the angle between the two. Without the weight they stay as they are."""
    if base is None or not isinstance(before.algorithm, DoRA):
        return after
    over = before.algorithm.axis
    magnitude = before.params.tensors["magnitude"]
    weight = wide(base.weight()).to(magnitude)
    rows = [_rows(inside(record), weight, over) for record in (before, after)]
    lengths = [v.norm(dim=1).clamp_min(torch.finfo(v.dtype).tiny) for v in rows]
    cosine: Tensor = (rows[0] * rows[1]).sum(1) / lengths[0] / lengths[1]
    fitted = magnitude * cosine.reshape(magnitude.shape)
    return replace(after, params=Params({**after.params.tensors, "magnitude": fitted}, after.params.scale))


def _rows(record: Record, weight: Tensor, axis: str) -> Tensor:
    changed = record.algorithm.weight(record.params, weight)
    return (changed if axis == "out" else changed.transpose(0, 1)).flatten(1)
