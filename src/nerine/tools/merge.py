"""`merge`: adapters into a checkpoint, tensor by tensor; `unmerge`: out of it again.

No model class, no copy of the model in memory: a tensor is read, changed in fp32, rounded once and written, while the
next one is being read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nerine.algorithms import Algorithm
from nerine.errors import MergeError, OptionError, shown
from nerine.files.checkpoint import Layer
from nerine.files.folder import open_adapter
from nerine.files.reports import LoadReport
from nerine.files.rewrite import rewrite, rewritten_size
from nerine.model.strengths import Strength
from nerine.ops.precision import wide
from nerine.ops.rounding import off_by, stochastic
from nerine.tools.edits import Edit, edits_of, strengths_of
from nerine.tools.output import check_output
from nerine.tools.progress import Progress, silent
from nerine.tools.weights import Weights, open_weights, read_adapter
from nerine.version import __version__

__all__ = ["Ingredient", "MergeReport", "Verified", "merge", "unmerge"]

PathLike = str | os.PathLike[str]
DTYPES = (None, torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Ingredient:
    """One adapter of a merge: how it was read, and at which strength."""

    read: LoadReport
    strength: float | dict[str, float]

    @property
    def name(self) -> str:
        return Path(self.read.file).name


@dataclass(frozen=True)
class Verified:
    """What came of computing some of the written tensors anew in fp64.

    `differing` counts the entries that are not that number rounded to the nearest. `worst` is the largest error over
    what one rounding and the noise of a sum in fp32 account for.
    """

    tensors: int
    entries: int
    differing: int
    worst: float

    @property
    def holds(self) -> bool:
        return self.worst <= 1


@dataclass(frozen=True)
class MergeReport:
    """What was merged into what. `layers` are those with at least one adapter; `rounded` says how."""

    base: str
    file: str
    adapters: tuple[Ingredient, ...]
    layers: int
    changed: int  # tensors
    tensors: int
    bytes: int
    dtype: str
    rounded: str
    written: bool
    verified: Verified | None = None
    restored: int = 0  # tensors that unmerging gave back bit by bit
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "adapters": [{**asdict(one), "counts": one.read.counts} for one in self.adapters]}

    def __str__(self) -> str:
        lines = []
        for one in self.adapters:
            counts = one.read.counts
            lines.append(
                f"{one.name} ({one.read.dialect}) at {_strength_text(one.strength)}: {counts['layers']} layers"
            )
            if one.read.unmatched:
                lines.append(f"  {len(one.read.unmatched)} keys not used:")
                lines += [f"    {shown(key)}: {why}" for key, why in list(one.read.unmatched.items())[:5]]
            lines += [f"  {note}" for note in one.read.notes]
        verb = "written" if self.written else "would be written (dry run)"
        lines.append(
            f"{self.file}: {self.changed} of {self.tensors} tensors changed in {self.layers} layers, {self.bytes:,} "
            f"bytes {verb} ({self.dtype}, {self.rounded})"
        )
        if self.restored:
            lines.append(f"{self.restored} tensors have their original bits again")
        if self.verified is not None:
            v = self.verified
            lines.append(
                f"verified in fp64: {v.tensors} tensors, {v.differing:,} of {v.entries:,} entries are not the nearest "
                f"number, the largest error is {v.worst:.2g} of what one rounding allows: "
                f"{'as promised' if v.holds else 'NOT as promised'}"
            )
        return "\n".join([*lines, *self.notes])


def _strength_text(strength: float | Mapping[str, float]) -> str:
    if isinstance(strength, Mapping):
        return ", ".join(f"{match}={number:g}" for match, number in strength.items())
    return f"{strength:g}"


def merge(
    base: PathLike,
    adapters: Sequence[PathLike | tuple[PathLike, Strength]],
    target: PathLike,
    *,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    verify: int = 0,
    strict: bool = False,
    dialect: str | None = None,
    component: str | None = None,
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
    algorithms: Sequence[type[Algorithm]] = (),
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> MergeReport:
    """Write the checkpoint `base` with adapters in it: W + Σ strength·(W' - W), in fp32, rounded once.

    `adapters` are files, or (file, strength); a strength is a number or numbers by pattern, {"unet.up_blocks": 0.5}, as
    in `nerine.load`. `dtype` is for all floating-point tensors that are written (None: each as it is). `seed` rounds
    by chance instead of to the nearest, so that small changes survive in the mean. `verify` computes that many changed
    tensors anew in fp64 from what was written. The target is a file where the base is one, else a folder.

    Raises:
        OptionError: no adapters, an unknown dtype, or a target that is in the way.
        FormatError: a file cannot be read, or nothing in an adapter belongs to this model; under `strict` any key.
        MergeError: a merged weight is not finite, or a bias has no place.
    """
    if dtype not in DTYPES:
        raise OptionError(f"dtype must be torch.float32, float16, bfloat16, float64 or None, got {dtype!r}")
    job = _Job(device, dtype, seed)
    with ExitStack() as stack:
        weights, ingredients, layers = _opened(
            stack, base, adapters, strict, dialect, component, allow_pickle, algorithms
        )
        check_output(target, [base, *(one.read.file for one in ingredients)], force)
        edits = edits_of(weights, layers)
        _check_edits(weights, edits)
        if dry_run:
            size = rewritten_size(weights.file, dtype)
        else:
            told = _told(weights, ingredients)
            change = job.merging(edits)
            size = rewrite(weights.file, target, change, dtype=dtype, metadata=told, progress=progress)
        checked = _verified(weights, edits, target, job, verify) if verify and not dry_run else None
        return _report(weights, target, ingredients, edits, size, job, dry_run, checked)


def unmerge(
    merged: PathLike,
    adapters: Sequence[PathLike | tuple[PathLike, Strength]],
    target: PathLike,
    *,
    original: PathLike | None = None,
    device: str | torch.device = "cpu",
    dialect: str | None = None,
    component: str | None = None,
    allow_pickle: bool = False,
    algorithms: Sequence[type[Algorithm]] = (),
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> MergeReport:
    """Write the checkpoint `merged` without adapters that were merged into it, at the strengths that they had then.

    With the `original` a tensor that holds nothing but this merge gets its bits back, and one that was changed
    further keeps that other change. Without it the change is subtracted, which leaves what was lost to rounding.

    Raises:
        MergeError: without the original, an adapter whose change depends on the weight (DoRA, OFT, GLoRA, IA3).
        FormatError: a file cannot be read, or the original is another model.
    """
    job = _Job(device, None, None)
    with ExitStack() as stack:
        first = merged if original is None else original
        weights, ingredients, layers = _opened(
            stack, first, adapters, False, dialect, component, allow_pickle, algorithms
        )
        inputs = [merged, *([original] if original is not None else []), *(one.read.file for one in ingredients)]
        check_output(target, inputs, force)
        edits = edits_of(weights, layers)
        if original is None:
            _check_fixed(edits)
            held, change = weights, job.merging({key: edit.turned() for key, edit in edits.items()})
        else:
            held = stack.enter_context(open_weights(merged, allow_pickle=allow_pickle))
            _check_same(weights, held, edits)
            change = job.restoring(edits, weights)
        size = rewritten_size(held.file)
        if not dry_run:
            size = rewrite(held.file, target, change, metadata=_untold(held, ingredients), progress=progress)
        return _report(held, target, ingredients, edits, size, job, dry_run, None)


# -- arithmetic ------------------------------------------------------------------------------------------------------
class _Job:
    """How tensors are changed: where, into which format, rounded how."""

    def __init__(self, device: str | torch.device, dtype: torch.dtype | None, seed: int | None) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.rng = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        self.restored = 0

    @property
    def rounded(self) -> str:
        return "rounded to the nearest" if self.rng is None else "rounded by chance"

    def _rounded(self, exact: Tensor, dtype: torch.dtype) -> Tensor:
        if self.rng is None or dtype.itemsize >= exact.dtype.itemsize:
            return exact.to(dtype)
        return stochastic(exact, exact.new_empty((), dtype=dtype), self.rng)

    def merging(self, edits: Mapping[str, Edit]) -> Any:
        """What `rewrite` asks for each tensor."""

        def change(key: str, stored: Tensor, dtype: torch.dtype) -> Tensor:
            edit = edits.get(key)
            if edit is None:
                return stored.to(dtype)
            plain = self.rng is None and self.device.type == "cpu" and stored.dtype != torch.float64
            found = edit.in_tiles(stored, dtype) if plain else None
            if found is None:
                found = self._rounded(edit.exact(stored, self.device), dtype)
            return edit.check(found).cpu()

        return change

    def restoring(self, edits: Mapping[str, Edit], original: Weights) -> Any:
        """The original bits where a tensor is what the merge made of them, else the tensor less the merge."""

        def change(key: str, stored: Tensor, dtype: torch.dtype) -> Tensor:
            edit = edits.get(key)
            if edit is None:
                return stored
            before = original.file.read(key)
            exact = edit.exact(before, self.device).cpu()
            if before.dtype == dtype and float(off_by(stored, exact, 1.0).max()) <= 1:
                self.restored += 1
                return before
            return edit.check((wide(stored) - (exact - wide(before))).to(dtype))

        return change


# -- checks ----------------------------------------------------------------------------------------------------------
def _opened(
    stack: ExitStack,
    base: PathLike,
    adapters: Sequence[PathLike | tuple[PathLike, Strength]],
    strict: bool,
    dialect: str | None,
    component: str | None,
    allow_pickle: bool,
    algorithms: Sequence[type[Algorithm]],
) -> tuple[Weights, list[Ingredient], list[dict[str, tuple[Layer, float]]]]:
    """The base, and every adapter with its layers and their strengths."""
    if not adapters:
        raise OptionError("merge: no adapter was given; name at least one")
    weights = stack.enter_context(open_weights(base, allow_pickle=allow_pickle))
    ingredients, layers = [], []
    for one in adapters:
        file, strength = one if isinstance(one, tuple) else (one, 1.0)
        source = stack.enter_context(open_adapter(file, allow_pickle=allow_pickle))
        found = read_adapter(source, weights, dialect=dialect, component=component, algorithms=algorithms)
        if strict and found.report.unmatched:
            key, why = next(iter(found.report.unmatched.items()))
            raise MergeError(
                f"{file}: {len(found.report.unmatched)} of its keys belong to no layer of {base} ({shown(key)}: {why})"
            )
        wanted = strengths_of(weights, found.layers, strength)
        told = {str(m): float(n) for m, n in strength.items()} if isinstance(strength, Mapping) else float(strength)
        ingredients.append(Ingredient(found.report, told))
        layers.append({path: (layer, wanted[path]) for path, layer in found.layers.items()})
    return weights, ingredients, layers


def _check_edits(weights: Weights, edits: Mapping[str, Edit]) -> None:
    for key, edit in edits.items():
        dtype = weights.file.dtype(key)
        if not dtype.is_floating_point:
            raise MergeError(
                f"{edit.label}: its weight is stored as {dtype}, a packed format; merge into the model as it was "
                "before it was quantised, and quantise the result"
            )


def _check_fixed(edits: Mapping[str, Edit]) -> None:
    moving = [edit for edit in edits.values() if not edit.is_fixed]
    if moving:
        algorithm = next(s.layer.algorithm for s in moving[0].shares if not s.is_fixed)
        raise MergeError(
            f"{moving[0].label} and {len(moving) - 1} other layers: what {type(algorithm).__name__} adds depends on "
            "the weight that it was merged into, so it cannot be subtracted; give that checkpoint with --original"
        )


def _check_same(original: Weights, merged: Weights, edits: Mapping[str, Edit]) -> None:
    for key, edit in edits.items():
        if key not in merged.file or merged.file.shape(key) != original.file.shape(key):
            raise MergeError(
                f"{edit.label}: the original has {shown(key)} of shape {original.file.shape(key)}, and "
                f"{merged.file.path} has not; is it a merge of this original?"
            )


def _verified(weights: Weights, edits: Mapping[str, Edit], target: PathLike, job: _Job, count: int) -> Verified:
    """Some of the tensors that were written, against fp64."""
    keys = [key for key in edits if not edits[key].is_bias] or list(edits)
    chosen = keys[:: max(1, len(keys) // count)][:count]
    differing, entries, worst = 0, 0, 0.0
    steps = 0.5 if job.rng is None else 1.0
    with open_weights(target) as written:
        for key in chosen:
            found = written.file.read(key)
            exact = edits[key].exact(weights.file.read(key), job.device, torch.float64).cpu()
            differing += int((exact.to(found.dtype) != found).sum())
            entries += found.numel()
            worst = max(worst, float(off_by(found, exact, steps).max()))
    return Verified(len(chosen), entries, differing, worst)


# -- what is told ----------------------------------------------------------------------------------------------------
_MERGES = "nerine_merge"  # metadata: the merges that a checkpoint has been through, as JSON


def _told(weights: Weights, ingredients: Sequence[Ingredient]) -> dict[str, str | None]:
    """What the header of the merged file says of the merge."""
    return {_MERGES: json.dumps([*_merges(weights), _entry(ingredients)], sort_keys=True)}


def _untold(merged: Weights, ingredients: Sequence[Ingredient]) -> dict[str, str | None]:
    """What it says once the merge is undone."""
    left = _merges(merged)
    own = _entry(ingredients)["adapters"]
    same = [i for i, one in enumerate(left) if isinstance(one, dict) and one.get("adapters") == own]
    if same:
        left.pop(same[-1])
    return {_MERGES: json.dumps(left, sort_keys=True) if left else None}


def _entry(ingredients: Sequence[Ingredient]) -> dict[str, Any]:
    return {"version": __version__, "adapters": [[one.name, one.strength] for one in ingredients]}


def _merges(weights: Weights) -> list[Any]:
    try:
        found = json.loads(weights.file.metadata.get(_MERGES, "[]"))
    except (ValueError, RecursionError):
        return []
    return found if isinstance(found, list) else []


def _report(
    weights: Weights,
    target: PathLike,
    ingredients: Sequence[Ingredient],
    edits: Mapping[str, Edit],
    size: int,
    job: _Job,
    dry_run: bool,
    checked: Verified | None,
) -> MergeReport:
    formats = sorted({str(job.dtype or weights.file.dtype(key)).removeprefix("torch.") for key in edits})
    return MergeReport(
        base=os.fspath(weights.file.path),
        file=os.fspath(target),
        adapters=tuple(ingredients),
        layers=len({share.label for edit in edits.values() for share in edit.shares}),
        changed=len(edits),
        tensors=len(weights.file.keys),
        bytes=size,
        dtype=", ".join(formats) or "nothing",
        rounded=job.rounded,
        written=not dry_run,
        verified=checked,
        restored=job.restored,
    )
