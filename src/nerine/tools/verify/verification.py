"""The verification itself: what is read, how the layers are gone through, and what becomes of the figures."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nerine.algorithms import Algorithm, DoRA, TLoRA
from nerine.errors import OptionError, UnsupportedBase, shown
from nerine.files.checkpoint import Checkpoint, Layer, Record
from nerine.files.detect import dialect_named
from nerine.files.dialects import DIALECTS
from nerine.files.folder import open_adapter
from nerine.files.readers import readers_of
from nerine.files.reading import read_checkpoint
from nerine.files.reports import LoadReport, ReaderRow
from nerine.files.store import Source
from nerine.model.reports import LOSSY
from nerine.ops.precision import is_finite, wide
from nerine.tools.progress import Progress, silent
from nerine.tools.verify.exports import Export, Piece, export, pieces_of, reloaded
from nerine.tools.verify.faces import ROUNDING, Faces, Merged, faces_of, merged_of, widened
from nerine.tools.verify.report import LayerCheck, Promise, VerifyReport
from nerine.tools.weights import Weights, beside, open_weights

__all__ = ["verify"]


@torch.no_grad()
def verify(
    file: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dialects: Sequence[str] | None = None,
    samples: int = 8,
    doubled: int = 4,
    seed: int = 0,
    source_dialect: str | None = None,
    component: str | None = None,
    allow_pickle: bool = False,
    algorithms: Sequence[type[Algorithm]] = (),
    progress: Progress = silent,
) -> VerifyReport:
    """Check an adapter file on its base: what is trained is what is merged, exported and read again.

    For every layer: the output in training against the merged weight on `samples` random inputs in fp32 (`doubled`
    layers, spread over the file, in fp64 as well); what rounding to the base's number format takes of the change; and
    W' after the layer was written in each of `dialects` (None: all that there are) and read again, in memory. For
    programs that read the file otherwise, how far off they are. A layer at a time is in memory.

    Raises:
        FormatError: file or base cannot be read, or nothing in the file belongs to the base.
        ShapeError: a tensor does not fit its layer.
        OptionError: there is no such dialect, or a number is none.
    """
    if samples < 1 or doubled < 0:
        raise OptionError(f"verify: samples must be at least 1 and doubled at least 0, got {samples} and {doubled}")
    chosen = [dialect_named(name) for name in (DIALECTS if dialects is None else dialects)]
    with (
        open_adapter(file, allow_pickle=allow_pickle) as source,
        open_weights(base, allow_pickle=allow_pickle) as weights,
    ):
        raw = read_checkpoint(
            source, weights.sites_for(source), dialect=source_dialect, component=component, others=algorithms
        )
        layers = {path: beside(layer, weights.base(path)) for path, layer in raw.layers.items()}
        own = dialect_named(raw.report.dialect)
        exports: dict[str, Export] = {}
        for one in dict.fromkeys([own, *chosen]):
            progress(0, len(layers), f"laying out {one.name}")
            exports[one.name] = export(layers, one, weights, component, algorithms)
        wanted = {one.name: exports[one.name] for one in chosen}
        job = _Job(weights, wanted, device, samples, seed, _spread(len(layers), doubled))
        job.run(layers, progress)
        return _reported((os.fspath(file), os.fspath(base)), source, raw, exports[own.name], job)


def _reported(names: tuple[str, str], source: Source, raw: Checkpoint, own: Export, job: _Job) -> VerifyReport:
    """What all of it comes to; `own` is the file once more in its own dialect."""
    readers = () if own.written is None else readers_of(own.written.layers, own.dialect)
    return VerifyReport(
        *names,
        own.dialect.name,
        ", ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in job.formats)),
        tuple(job.rows),
        tuple(job.promises()),
        readers,
        (*_findings(raw.report), *job.strays()),
        (*_notes(raw, job), *_same_bits(source, own), *_sampled(readers)),
        job.lost,
    )


def _spread(count: int, wanted: int) -> frozenset[int]:
    """`wanted` of `count` indices, from the first to the last."""
    if wanted >= count:
        return frozenset(range(count))
    return frozenset(round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted))


@dataclass
class _Job:
    """One verification, as it goes through the layers."""

    base: Weights
    exports: Mapping[str, Export]
    device: torch.device | str
    samples: int
    seed: int
    doubled: frozenset[int]
    rows: list[LayerCheck] = field(default_factory=list)
    formats: list[torch.dtype] = field(default_factory=list)
    merges: dict[str, Merged] = field(default_factory=dict)
    faces: dict[str, Faces] = field(default_factory=dict)
    unwritable: dict[str, str] = field(default_factory=dict)
    failed: dict[str, list[str]] = field(default_factory=dict)  # promise: layers for which it does not hold

    def run(self, layers: Mapping[str, Layer], progress: Progress) -> None:
        """Go through all layers, one of the base after the other."""
        done = 0
        for path, pieces in pieces_of(layers).items():
            progress(done, len(layers), path)
            self.check(path, pieces)
            done += len(pieces)
        progress(done, len(layers), "programs that read it")

    def check(self, whole: str, pieces: Sequence[Piece]) -> None:
        """Go through a layer of the base and the adapters on it, or on some of its rows."""
        stored, bias = self.base.weight(whole), self.base.bias(whole)
        weight = wide(stored).to(self.device)
        bias = None if bias is None else wide(bias).to(self.device)
        self.formats.append(stored.dtype)
        found: list[tuple[LayerCheck, list[str]]] = []
        change: Tensor | None = None
        for rows, layer in pieces:
            path = whole if rows is None else f"{whole}[{rows[0]}:{rows[1]}]"
            own = slice(None) if rows is None else slice(*rows)
            row, problems, change = self._check_one(
                path, layer, weight[own], None if bias is None else bias[own], stored.dtype
            )
            found.append((row, problems))
        figures: dict[str, float] = {}
        for name, exported in self.exports.items() if change is not None else ():
            kept = [piece for piece in pieces if _path(whole, piece) not in exported.refused]
            if exported.written is None or exported.error or not kept:
                continue
            known = change if len(pieces) == 1 and pieces[0][0] is None else None
            off, holds = reloaded(kept, exported.pieces.get(whole, ()), weight, known)
            figures[name] = off
            if not holds:
                self.failed.setdefault(f"reload {name}", []).append(whole)
                found[0][1].append(f"{name}: W' is off by {off:.1e} of the change after reading")
        self.rows += [replace(row, reloaded=figures, problems=tuple(problems)) for row, problems in found]

    def _check_one(
        self, path: str, layer: Layer, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> tuple[LayerCheck, list[str], Tensor | None]:
        record = widened(layer.record(), self.device)
        row = LayerCheck(path, str(record.algorithm), 0.0)
        problems = [f"not finite: {name}" for name, t in record.params.tensors.items() if not is_finite(t)]
        problems += [] if is_finite(weight) else ["the weight of the base is not finite"]
        if problems:
            self.failed.setdefault("merge", []).append(path)
            return row, problems, None
        merged, change = merged_of(record, weight, bias, dtype)
        self.merges[path] = merged
        problems += self._merge_problems(path, record, merged, bias, dtype)
        loaded = replace(record, params=record.algorithm.from_file(record.params))  # as training has them
        faces = faces_of(loaded, weight, bias, change, self.samples, self.seed, len(self.faces) in self.doubled)
        self.faces[path] = faces
        if not faces.holds:
            self.failed.setdefault("train", []).append(path)
            in_64 = "" if faces.error64 is None else f" ({faces.error64:.1e} in fp64)"
            problems.append(f"training and merge differ by {faces.error:.1e} of the change{in_64}")
        row = replace(row, change=merged.change, trained=faces.error, trained64=faces.error64, lost=merged.lost)
        return row, problems, change

    def _merge_problems(
        self, path: str, record: Record, merged: Merged, bias: Tensor | None, dtype: torch.dtype
    ) -> list[str]:
        problems = []
        name = str(dtype).removeprefix("torch.")
        try:
            self.base.key(path)
        except UnsupportedBase as error:
            self.unwritable[path] = str(error)
        if not merged.is_finite:
            problems.append(f"the merged weight is not finite in {name}")
        if not merged.error <= ROUNDING:
            problems.append(f"a merge differs from W + (W' - W) by {merged.error:.1e} of the weight")
        if record.algorithm.shift(record.params) is not None and bias is None:
            problems.append("it moves a bias, and the layer has none")
        if problems:
            self.failed.setdefault("merge", []).append(path)
        return problems

    # -- what it comes to ----------------------------------------------------------------------------------------------
    @property
    def lost(self) -> float | None:
        """The share of the whole change that rounding takes in a merge."""
        known = [m for path, m in self.merges.items() if path not in self.unwritable]
        total = sum(m.square for m in known)
        return (sum(m.lost_square for m in known) / total) ** 0.5 if total else None

    def promises(self) -> Iterable[Promise]:
        for name, key in (("train = merge, fp32", "error"), ("train = merge, fp64", "error64")):
            found = {path: getattr(faces, key) for path, faces in self.faces.items()}
            known = {path: value for path, value in found.items() if value is not None}
            worst = max(known, key=known.__getitem__, default="")
            holds = not self.failed.get("train")
            yield Promise(name, holds, len(known), len(self.faces), known.get(worst), worst)
        yield self._merging()
        for name, exported in self.exports.items():
            figures = {row.layer: row.reloaded[name] for row in self.rows if name in row.reloaded}
            worst = max(figures, key=figures.__getitem__, default="")
            holds = not (self.failed.get(f"reload {name}") or exported.broken)
            at = worst if figures.get(worst) else ""
            why = exported.error or _refusals(exported)
            yield Promise(f"reload: {name}", holds, len(figures), len(self.rows), figures.get(worst), at, why)

    def _merging(self) -> Promise:
        known = {path: m.lost for path, m in self.merges.items() if path not in self.unwritable}
        worst = max(known, key=known.__getitem__, default="")
        names = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in self.formats)
        holds = not self.failed.get("merge") and not (self.lost or 0.0) > LOSSY
        why = next(iter(self.unwritable.values()), "")
        at = worst if known.get(worst) else ""
        return Promise(f"merge, {' '.join(names)}", holds, len(known), len(self.rows), known.get(worst), at, why)

    def strays(self) -> list[str]:
        """Layers that come back from a file and were not in it, other than with nothing."""
        given = {row.layer.partition("[")[0] for row in self.rows}
        found = []
        for name, exported in self.exports.items():
            for path, pieces in exported.pieces.items():
                if path in given:
                    continue
                weight = wide(self.base.weight(path)).to(self.device)
                if reloaded([], pieces, weight, torch.zeros_like(weight))[0]:
                    found.append(f"{name}: {shown(path)} has no adapter, and comes back with one")
        return found


def _path(whole: str, piece: Piece) -> str:
    return whole if piece[0] is None else f"{whole}[{piece[0][0]}:{piece[0][1]}]"


def _refusals(exported: Export) -> str:
    if not exported.refused:
        return ""
    why = Counter(exported.refused.values()).most_common(1)[0][0]
    return f"refused {len(exported.refused)}: {why}"


# -- what is to be said ------------------------------------------------------------------------------------------------
def _findings(report: LoadReport) -> list[str]:
    """What in the file belongs to nothing, and what it should have had."""
    by_reason: dict[str, list[str]] = {}
    for key, why in report.unmatched.items():
        reason = why if not why.startswith("the model has no layer") else "the base has no such layer"
        by_reason.setdefault(reason, []).append(key)
    found = [f"{len(keys)} keys are not used (first {shown(keys[0])}): {why}" for why, keys in by_reason.items()]
    if report.missing:
        found.append(f"{len(report.missing)} layers are missing in the file (first {shown(report.missing[0])})")
    return found


def _notes(raw: Checkpoint, job: _Job) -> list[str]:
    notes = list(raw.report.notes)
    bare = [path for path, layer in raw.layers.items() if _is_bare(layer)]
    if bare:
        notes.append(
            f"{len(bare)} layers of T-LoRA (first {bare[0]}) come without what they started from: it is taken from the "
            "weights of this base, and is another on any other"
        )
    if job.base.packed:
        notes.append(f"{len(job.base.packed)} layers of the base are packed, and no adapter on them can be checked")
    whole = [path for path, faces in job.faces.items() if faces.error is None]
    if whole:
        notes.append(
            f"{len(whole)} layers compute with the changed weight itself, so that train = merge by construction"
        )
    still = [path for path, merged in job.merges.items() if not merged.square]
    if still:
        notes.append(f"{len(still)} layers change nothing (first {still[0]})")
    small = [
        p for p, f in job.faces.items() if f.holds and f.error64 is not None and f.error is not None and f.error > 1e-4
    ]
    if small:
        notes.append(
            f"in {len(small)} layers (first {small[0]}) the change is so small beside the weight that fp32 rounds it "
            f"by up to {max(job.faces[p].error or 0 for p in small):.0e}; in fp64 both sides agree"
        )
    lost, worst = job.lost, max((m.lost for m in job.merges.values()), default=0.0)
    if lost is not None and lost > 0.01:
        notes.append(
            f"merging rounds away {lost:.0%} of the change ({worst:.0%} in the worst layer): keep the adapter beside "
            "the model, or merge into fp32"
        )
    return notes


def _is_bare(layer: Layer) -> bool:
    inner = layer.algorithm.inner if isinstance(layer.algorithm, DoRA) else layer.algorithm
    return isinstance(inner, TLoRA) and "base_q" not in layer.shapes


def _same_bits(source: Source, own: Export) -> list[str]:
    """How many tensors of the file come out bit by bit when it is written again in its own dialect."""
    if own.written is None:
        return []
    same = other = 0
    for outgoing in own.written.tensors:
        if outgoing.key in source.keys:
            was, now = source.read(outgoing.key), outgoing.make()
            if was.dtype == now.dtype and torch.equal(
                was, now.reshape(was.shape) if was.numel() == now.numel() else now
            ):
                same += 1
            else:
                other += 1
    named = len(own.written.tensors)
    lacking = f", {named - same - other} have other names" if named > same + other else ""
    return [f"written again in its own dialect, {same} of {named} tensors are the same bit by bit{lacking}"]


def _sampled(readers: Sequence[ReaderRow]) -> list[str]:
    known = [row for row in readers if row.worst is not None]
    return ["how far programs are off was worked out on up to 16 layers of each"] if known else []
