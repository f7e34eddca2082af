"""`combine`: several adapter files as one, so that it adds what they would add together, each at its strength."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nerine.algorithms import Algorithm
from nerine.errors import FormatError, OptionError, shown
from nerine.files.checkpoint import Checkpoint, Layer
from nerine.files.dialects.base import Dialect
from nerine.files.meta import Meta
from nerine.files.pieces import Piece
from nerine.files.reports import LoadReport, SaveReport
from nerine.model.strengths import Strength
from nerine.tables import table
from nerine.tools.adapter_file import Form, Given, given, laid, output_dialect, written
from nerine.tools.blend import Blend, Blended, blended
from nerine.tools.exact import brought, kept_dtype, kind_of, rank_in
from nerine.tools.lineup import Term, line_up
from nerine.tools.output import check_output
from nerine.tools.progress import Progress, silent
from nerine.tools.shelf import Shelf, open_shelf
from nerine.tools.weights import Weights, no_base, open_weights

__all__ = ["CombineReport", "CombineRow", "combine"]

PathLike = str | os.PathLike[str]
# What the header says of the model that an adapter is for: kept where all files say the same.
ABOUT_THE_MODEL = (
    "ss_base_model_version",
    "ss_v2",
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.prediction_type",
    "modelspec.resolution",
)


@dataclass(frozen=True)
class CombineRow:
    """What became of one layer. `files` are the numbers of those that have it, `method` is "kept", "exact", "fitted" or
    "dropped", and `error` the relative error of the change."""

    layer: str
    files: tuple[int, ...]
    before: str
    after: str
    rank: int | None
    method: str
    error: float = 0.0
    size: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class CombineReport:
    """What was read, at which strengths, what became of each layer, and what was written."""

    reads: tuple[LoadReport, ...]
    strengths: tuple[float | dict[str, float], ...]
    written: SaveReport
    rows: tuple[CombineRow, ...]
    notes: tuple[str, ...] = ()
    dry_run: bool = False

    @property
    def error(self) -> float:
        """The relative error of all layers but those that are kept, before numbers are rounded for the file."""
        whole = sum(row.size**2 for row in self.rows)
        return (sum((row.error * row.size) ** 2 for row in self.rows) / whole) ** 0.5 if whole else 0.0

    @property
    def worst(self) -> float:
        return max((row.error for row in self.rows), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        reads = [read.to_dict() for read in self.reads]
        return {**asdict(self), "reads": reads, "error": self.error, "worst": self.worst}

    def __str__(self) -> str:
        head = ("layer", "of", "was", "is", "rank", "how", "error", "note")
        lines = []
        for number, (read, strength) in enumerate(zip(self.reads, self.strengths, strict=True), 1):
            lines.append(f"{number}: {read.file} ({read.dialect}) at {_text(strength)}, {len(read.rows)} layers")
            lines += [f"   not used: {shown(key)}: {why}" for key, why in read.unmatched.items()]
            lines += [f"   {note}" for note in read.notes]
        lines.append(table(head, [_shown(row) for row in self.rows]))
        counts = {how: sum(row.method == how for row in self.rows) for how in ("kept", "exact", "fitted", "dropped")}
        lines.append(", ".join(f"{count} {how}" for how, count in counts.items() if count))
        if counts["fitted"]:
            lines[-1] += f"; relative error of the change: {self.error:.2g} in all, {self.worst:.2g} at worst"
        lines.append(f"{self.written}{' (dry run: not written)' if self.dry_run else ''}")
        return "\n".join([*lines, *self.notes])


def _shown(row: CombineRow) -> tuple[object, ...]:
    of = " ".join(str(number + 1) for number in row.files)
    error = f"{row.error:.2g}" if row.method == "fitted" else ""
    return (
        shown(row.layer),
        of,
        row.before,
        row.after,
        "" if row.rank is None else row.rank,
        row.method,
        error,
        row.note,
    )


def _text(strength: float | Mapping[str, float]) -> str:
    if isinstance(strength, Mapping):
        return ", ".join(f"{match}={number:g}" for match, number in strength.items())
    return f"{strength:g}"


def combine(
    adapters: Sequence[PathLike | tuple[PathLike, Strength]],
    target: PathLike,
    *,
    method: str = "concat",
    to: str | None = None,
    rank: int | None = None,
    density: float = 0.5,
    sign: str = "total",
    seed: int = 0,
    base: PathLike | nn.Module | None = None,
    dialect: str | None = None,
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
) -> CombineReport:
    """Write `adapters` (files, or pairs of a file and its strength) to `target` as one: W + Σ strength·(W' - W).

    A strength is a number, or numbers by pattern as for `nerine.load`. Methods: "concat" puts low-rank adapters side by
    side (exact), "svd" and "linear" with a `rank` cut that down to the best of it; "ties", "dare" (= "dare_linear"),
    "dare_ties" and "magnitude_prune" let only some entries of the changes count (`density`, `sign`, `seed`), as in
    PEFT. What is no low-rank product becomes a LoRA of the `rank`, or with to="full" the exact difference. A layer that
    one file alone has is kept. Adapters whose change depends on the weight (DoRA, OFT, GLoRA, IA3) need the `base`, on
    which each acts by itself, as stacked adapters do; it also settles the names in files of different programs.

    Embeddings are kept; of the metadata, what all files say of their model, and from what the file was made.

    Raises:
        FormatError: a file cannot be read, the files are for different models, two have embeddings for one word, or a
            weight is needed and there is no `base`.
        OptionError: settings that make no sense together, a layer for which a rank or "full" has to be chosen, or a
            target that exists and `force` is not set.
        TargetError: a pattern of strengths matches no layer.
    """
    want = Blend(method, to, rank, density, sign, seed)
    pairs = [one if isinstance(one, tuple) else (one, 1.0) for one in adapters]
    if not pairs:
        raise OptionError("combine: no adapter was given; name one at least")
    inputs = [*(file for file, _ in pairs), *([base] if isinstance(base, str | os.PathLike) else [])]
    place = check_output(target, inputs, force)
    strengths = [strength for _, strength in pairs]
    with ExitStack() as stack:
        weights, opened = _opened(stack, [file for file, _ in pairs], base, component, allow_pickle, algorithms)
        reads = [one.read for one in opened]
        shelf = stack.enter_context(open_shelf(None if dry_run else place))
        chosen = output_dialect(dialect, reads[0])
        job = _Job(want, chosen, [read.report.dialect for read in reads], dtype, device, shelf)
        layers, rows = job.run(line_up(reads, strengths, weights), progress)
        form = Form(chosen, dtype, component, dict(metadata or {}), hashes, "algorithms")
        out = laid(layers, _whole(reads, strengths, layers), form, opened[0].sites)
        saved = written(place, out, dry_run=dry_run)
    told = tuple(read.report for read in reads), tuple(map(_told, strengths))
    return CombineReport(*told, saved, tuple(rows), _notes(rows), dry_run)


def _told(strength: Strength) -> float | dict[str, float]:
    if isinstance(strength, Mapping):
        return {str(match): float(number) for match, number in strength.items()}
    return float(strength)


def _opened(
    stack: ExitStack,
    files: Sequence[PathLike],
    base: PathLike | nn.Module | None,
    component: str | None,
    allow_pickle: bool,
    algorithms: Sequence[type[Algorithm]],
) -> tuple[Weights | nn.Module | None, list[Given]]:
    """The base and all files, open until the stack is closed."""
    weights = stack.enter_context(_base(base, allow_pickle))
    options: dict[str, Any] = {"component": component, "allow_pickle": allow_pickle, "algorithms": algorithms}
    return weights, [stack.enter_context(given(file, weights, **options)) for file in files]


@contextmanager
def _base(base: PathLike | nn.Module | None, allow_pickle: bool) -> Iterator[Weights | nn.Module | None]:
    if base is None or isinstance(base, nn.Module):
        yield base
        return
    with open_weights(base, allow_pickle=allow_pickle) as weights:
        yield weights


def _notes(rows: Sequence[CombineRow]) -> tuple[str, ...]:
    numbers = {number for row in rows for number in row.files}
    notes = ["the metadata of training was left out: it is that of none of these files any more"]
    if len(numbers) > 1 and not any(len(set(row.files)) > 1 for row in rows):
        notes.append("the files have no layer in common; if they should, give the base, which settles what is what")
    return tuple(notes)


class _Job:
    """The layers of all files being made one."""

    def __init__(
        self,
        want: Blend,
        chosen: Dialect,
        dialects: Sequence[str],
        dtype: torch.dtype | None,
        device: str | torch.device,
        shelf: Shelf,
    ) -> None:
        self.want, self.chosen, self.dialects = want, chosen, dialects
        self.dtype, self.device, self.shelf = dtype, device, shelf

    def run(self, terms: Mapping[str, Sequence[Term]], progress: Progress) -> tuple[dict[str, Layer], list[CombineRow]]:
        layers: dict[str, Layer] = {}
        rows = []
        for number, (path, own) in enumerate(terms.items()):
            progress(number, len(terms), path)
            layer, row = self._one(path, own)
            rows.append(row)
            if layer is not None:
                layers[path] = layer
        progress(len(terms), len(terms), "")
        if not layers:
            raise OptionError("combine: every layer has the strength 0, so that nothing is left to write")
        return layers, rows

    def _one(self, path: str, terms: Sequence[Term]) -> tuple[Layer | None, CombineRow]:
        before = " + ".join(dict.fromkeys(kind_of(term.layer.algorithm) for term in terms))
        files = tuple(term.file for term in terms)
        counting = [term for term in terms if term.strength]
        if not counting:
            return None, CombineRow(path, files, before, "", None, "dropped", note="strength 0")
        records = [(brought(term.layer, path, self.device), term.strength) for term in counting]
        base = next((term.layer.base for term in counting if term.layer.base is not None), None)
        found = blended(path, records, base, self.want)
        layer = self._layer(path, counting, found, base)
        after = layer.sketch()
        row = CombineRow(
            path,
            files,
            before,
            kind_of(after.algorithm),
            rank_in(after),
            found.method,
            found.error,
            found.size,
            found.note,
        )
        return layer, row

    def _layer(self, path: str, terms: Sequence[Term], found: Blended, base: Any) -> Layer:
        is_kept = found.record is None
        for term in terms:
            if term.layer.finish is not None and not (is_kept and self.dialects[term.file] == self.chosen.name):
                raise no_base(path, "what it is in full")
        if found.record is None:
            return terms[0].layer
        formats = [kept_dtype(term.layer, self.dtype) for term in terms]
        dtype = formats[0]
        for other in formats[1:]:
            dtype = torch.promote_types(dtype, other)
        return self.shelf.layer(path, found.record, dtype, base)


def _whole(reads: Sequence[Checkpoint], strengths: Sequence[Strength], layers: Mapping[str, Layer]) -> Checkpoint:
    """What the combined file says beside its layers: what all say of the model, embeddings, and where it comes from."""
    others = [read.meta.other for read in reads]
    shared = {
        key: others[0][key]
        for key in ABOUT_THE_MODEL
        if key in others[0] and all(o.get(key) == others[0][key] for o in others)
    }
    made = ", ".join(
        f"{Path(read.report.file).name} at {_text(_told(strength))}"
        for read, strength in zip(reads, strengths, strict=True)
    )
    told = {path: algorithm for read in reads for path, algorithm in read.meta.layers.items()}
    meta = Meta(layers=told, other={**shared, "modelspec.merged_from": made})
    flat = tuple(path for path in layers if any(path in read.flat for read in reads))
    return replace(reads[0], layers=layers, meta=meta, embeddings=_embeddings(reads), flat=flat)


def _embeddings(reads: Sequence[Checkpoint]) -> dict[str, dict[str, Piece]]:
    """Those of all files.

    Raises:
        FormatError: two of them have other vectors for one word.
    """
    found: dict[str, dict[str, Piece]] = {}
    for read in reads:
        for word, own in read.embeddings.items():
            for name, piece in own.items():
                there = found.setdefault(word, {}).setdefault(name, piece)
                if there is not piece and not _same(there, piece):
                    raise FormatError(
                        f"{read.report.file}: it has another embedding for {shown(word)} than a file before it; rename "
                        "the trigger word in one of them"
                    )
    return found


def _same(a: Piece, b: Piece) -> bool:
    return a.shape == b.shape and torch.equal(a.read().float(), b.read().float())
