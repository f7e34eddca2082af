"""`extract`: an adapter out of two checkpoints, layer by layer."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nerine.algorithms import Algorithm, LoRA
from nerine.errors import OptionError
from nerine.files.detect import dialect_named
from nerine.files.dialects.base import Dialect
from nerine.files.folder import write
from nerine.model.patterns import Match
from nerine.model.rules import Rule
from nerine.tools.extract.choice import Choice, choose
from nerine.tools.extract.fitting import LEAST, Fitter
from nerine.tools.extract.pairs import pair_up
from nerine.tools.extract.plan import Plan, plan_of
from nerine.tools.extract.ranks import wanted_of
from nerine.tools.extract.report import ExtractReport
from nerine.tools.extract.rest import Rest, look_at
from nerine.tools.extract.sheet import Sheet
from nerine.tools.output import check_output
from nerine.tools.progress import Progress, silent
from nerine.tools.shelf import open_shelf
from nerine.tools.weights import Weights, open_weights

__all__ = ["extract"]

PathLike = str | os.PathLike[str]
DTYPES = (None, torch.float32, torch.float16, torch.bfloat16)


def extract(
    base: PathLike,
    tuned: PathLike,
    target: PathLike,
    *,
    algorithm: str | Algorithm | Sequence[Rule] = "lora",
    rank: int | None = None,
    energy: float | None = None,
    threshold: float | None = None,
    ratio: float | None = None,
    quantile: float | None = None,
    size: int | None = None,
    mode: str | None = None,
    param: float | None = None,
    conv_rank: int | None = None,
    algos: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    dora: bool = False,
    tucker: bool = False,
    train_norm: bool = False,
    targets: Match | Sequence[Match] = "all",
    min_change: float = 0.0,
    dialect: str = "kohya",
    component: str | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    hashes: bool = False,
    allow_pickle: bool = False,
    device: str | torch.device = "cpu",
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> ExtractReport:
    """Write to `target` the adapters that turn the checkpoint `base` into `tuned`, as nearly as their form can.

    `algorithm` is a name (`settings`: more of its own), an algorithm, rules for single layers, or "auto" (`algos`: of
    which). How large it is to be says one of: `rank` (`conv_rank` for kernels); `energy`, the share of the squared
    difference to keep; LyCORIS's `threshold`, `ratio`, `quantile`, or `mode` and `param`; or `size`, the bytes of the
    whole file, spent over layers (and algorithms) so that the sum of |W' - tuned|² is least. `dora` keeps magnitudes
    apart, `tucker` gives convolutions a core, `train_norm` takes norms along. Layers with |D|/|W| of at most
    `min_change` get no adapter. `dtype` is that of the file (None: that of `tuned`).

    Raises:
        FormatError: a checkpoint cannot be read or is another model, or the dialect cannot hold an adapter.
        OptionError: settings that do not go together, no or two sizes, or a target that exists and `force` is not set.
        TargetError: the targets match no layer.
    """
    sizes: dict[str, Any] = {
        "rank": rank,
        "energy": energy,
        "threshold": threshold,
        "ratio": ratio,
        "quantile": quantile,
    }
    wanted = wanted_of(**sizes, size=size, mode=mode, param=param, conv_rank=conv_rank)
    plan = plan_of(algorithm, wanted, algos, settings or {}, dora, tucker)
    form = _Form(dialect_named(dialect), component, dtype, metadata or {}, hashes)
    place = check_output(target, [base, tuned], force)
    with open_weights(base, allow_pickle=allow_pickle) as a, open_weights(tuned, allow_pickle=allow_pickle) as b:
        return _extracted(a, b, plan, form, place, (targets, train_norm, min_change), dry_run, device, progress)


class _Form(NamedTuple):
    """How the adapters are written."""

    dialect: Dialect
    component: str | None
    dtype: torch.dtype | None
    metadata: Mapping[str, str]
    hashes: bool


def _extracted(
    base: Weights,
    tuned: Weights,
    plan: Plan,
    form: _Form,
    place: Path,
    which: tuple[Match | Sequence[Match], bool, float],
    dry_run: bool,
    device: str | torch.device,
    progress: Progress,
) -> ExtractReport:
    """Two open checkpoints as an adapter; `which` are the targets, whether norms go along, and the least change.

    Raises:
        OptionError: an unknown format, or a change below nothing.
    """
    targets, train_norm, min_change = which
    if form.dtype not in DTYPES:
        raise OptionError(f"dtype must be torch.float32, float16, bfloat16 or None, got {form.dtype!r}")
    if min_change < 0:
        raise OptionError(f"extract: min_change is |D|/|W|, at least 0, got {min_change!r}")
    pairs = pair_up(base, tuned)
    pairs.check()
    choice = choose(pairs, plan, targets, train_norm)
    names = json.dumps({"base": base.file.path.name, "tuned": tuned.file.path.name})
    told = {"extracted_from": names, **form.metadata}
    sheet = Sheet(base, form.dialect, form.dtype or _usual_dtype(choice), form.component, told)
    with open_shelf(None if dry_run else place) as shelf:
        fitter = Fitter(choice, plan, sheet, shelf, min_change, device, progress)
        fitter.run()
        rest = look_at(pairs, choice)
        laid = sheet.lay_out(fitter.layers)
        size = laid.bytes if dry_run else write(place, form.dialect, *laid, form.hashes)
    return report_of(fitter, rest, str(place), size, dry_run)


def _usual_dtype(choice: Choice) -> torch.dtype:
    """The format that most layers of the second checkpoint have, of those that adapters are written in."""
    found = Counter(choice.pairs[path].formats[1] for path in choice.algorithms)
    ((usual, _),) = found.most_common(1)
    if usual in DTYPES:
        return usual
    return torch.bfloat16 if usual.itemsize < 2 else torch.float32


def report_of(fitter: Fitter, rest: Rest, file: str, size: int, dry_run: bool) -> ExtractReport:
    """What a fitter has done."""
    tally, sheet, plan = fitter.tally, fitter.sheet, fitter.plan
    pairs = next(iter(fitter.choice.pairs.values()))
    notes = list(rest.notes)
    weights = {path: layer for path, layer in fitter.layers.items() if path in fitter.choice.weights}
    fused = [path for path, own in weights.items() if path not in fitter.stems and isinstance(own.algorithm, LoRA)]
    if fused and (plan.dora is not None or plan.wants_others):
        notes.append(f"{len(fused)} layers are in other pieces in this dialect; they got plain products")
    return ExtractReport(
        base=pairs.base.file.path.name,
        tuned=pairs.tuned.file.path.name,
        file=file,
        dialect=sheet.dialect.name,
        wanted=str(plan),
        dtype=str(sheet.dtype).removeprefix("torch."),
        rows=tuple(fitter.rows),
        size=size,
        error=math.sqrt(tally.error / tally.change) if tally.change else 0.0,
        change=math.sqrt(tally.change),
        relative=math.sqrt(tally.change / max(tally.weight, LEAST)),
        identical=tally.identical,
        threshold=tally.threshold,
        small=tally.small,
        min_change=fitter.min_change,
        left={**fitter.choice.left, **tally.left},
        biases=tally.biases,
        bias_change=math.sqrt(tally.bias_change / tally.bias_size) if tally.bias_size else 0.0,
        norms=rest.norms,
        norm_change=rest.norm_change,
        notes=tuple(notes),
        written=not dry_run,
    )
