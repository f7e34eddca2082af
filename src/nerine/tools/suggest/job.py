"""`suggest`: which adapter a change asks for, at a size, with the numbers that say so."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from nerine.errors import OptionError, nearest
from nerine.model.patterns import Match
from nerine.tools.extract.fitting import LEAST
from nerine.tools.extract.options import FAMILIES
from nerine.tools.extract.plan import AUTO
from nerine.tools.progress import Progress, silent
from nerine.tools.suggest.advice import Where, advise
from nerine.tools.suggest.report import Curve, SuggestReport
from nerine.tools.suggest.study import BASELESS, changes_of, study
from nerine.tools.suggest.weighing import Scales, block_of, kind_of, shares_by, silent_kinds

__all__ = ["SIZES", "suggest"]

SIZES = tuple(n * 10**6 for n in (1, 2, 5, 10, 20, 50, 100))
ENOUGH = 0.9  # of the change: the size that keeps so much is recommended where none was asked for

PathLike = str | os.PathLike[str]


def suggest(
    base: PathLike | None,
    tuned: PathLike | None = None,
    adapter: PathLike | None = None,
    *,
    size: int | None = None,
    sizes: Sequence[int] = SIZES,
    algos: Sequence[str] | None = None,
    left_out: float = 0.01,
    targets: Match | Sequence[Match] = "all",
    dtype: torch.dtype = torch.float16,
    dialect: str = "kohya",
    component: str | None = None,
    allow_pickle: bool = False,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> SuggestReport:
    """Look at the difference of two checkpoints, or at what an adapter changes (alone, or on its base), and say which
    algorithm, rank and layers suit it best for a `size` in bytes.

    The report has the relative error of each algorithm (`algos`) at each of the `sizes`, at equal bytes and in `dtype`;
    effective ranks; and which blocks and kinds of layers carry the change. Kinds that carry less than `left_out` of it
    together may be left out. Without `size` it is the least of the sizes that keeps nine tenths. Bytes are those of the
    file, but for some hundred; `nerine.tools.extract` keeps to them exactly. One layer is in memory at a time.

    Raises:
        FormatError: a file cannot be read, the checkpoints are different models, or nothing has changed.
        OptionError: neither or both of `tuned` and `adapter`, or an unknown algorithm.
    """
    if (tuned is None) == (adapter is None) or (adapter is None and base is None):
        raise OptionError("suggest: give base and tuned, or an adapter (alone or with its base)")
    names = _names(algos, adapter is not None and base is None)
    wanted = [own for own in sizes if own != size] if size else list(sizes)
    if not 0 <= left_out < 1 or any(own <= 0 for own in [*wanted, size or 1]):
        raise OptionError("suggest: sizes are bytes above 0, and left_out is a share from 0 to 1")
    asked = sorted([*wanted, *([size] if size else [])])
    given: dict[str, Any] = {"targets": targets, "component": component, "allow_pickle": allow_pickle}
    with changes_of(base, tuned, adapter, **given, device=device, progress=progress) as (found, _):
        scales = Scales(study(found, names, dialect, dtype))
    return _weighed(scales, names, asked, size, left_out, Where(base, tuned, adapter, dtype, dialect))


def _weighed(
    scales: Scales, names: Sequence[str], asked: Sequence[int], size: int | None, left_out: float, where: Where
) -> SuggestReport:
    """What follows from the layers that were looked at."""
    curves = [scales.curve(name, [name], asked) for name in names]
    if len(names) > 1:
        curves.insert(0, scales.curve("auto", names, asked))
    rows = {name: scales.uniform(name) for name in names}
    if "lora" in names:
        curves.append(scales.one_for_all("lora, one rank", rows["lora"], asked))
    kinds = shares_by(scales.layers, kind_of)
    quiet = silent_kinds(kinds, left_out)
    base, other = where.base, where.tuned if where.tuned is not None else where.adapter or ""
    advice = advise(scales, rows, curves, asked, size or _enough(curves[0], asked), quiet, where)
    weights = [layer.weight for layer in scales.layers if layer.weight is not None]
    return SuggestReport(
        base="" if base is None else Path(base).name,
        other=Path(other).name,
        layers=len(scales.layers),
        relative=math.sqrt(scales.total / max(sum(weights), LEAST)) if weights else None,
        directions=_spread([layer.directions for layer in scales.layers]),
        sizes=tuple(asked),
        curves=tuple(curves),
        blocks=shares_by(scales.layers, block_of),
        kinds=kinds,
        advice=advice,
        left_out=left_out,
        silent=quiet,
    )


def _names(algos: Sequence[str] | None, is_baseless: bool) -> list[str]:
    """The algorithms to weigh."""
    usual = [name for name in AUTO if name in BASELESS] if is_baseless else list(AUTO)
    names = usual if algos is None else list(dict.fromkeys(algos))
    for name in names:
        if name not in FAMILIES and name != "lora":
            raise OptionError(f"suggest: {name!r} is not weighed. {nearest(name, ['lora', *FAMILIES])}")
        if is_baseless and name not in BASELESS:
            raise OptionError(f"suggest: what {name} can do depends on the weights; give the base of the adapter")
    if not names:
        raise OptionError("suggest: algos names none; leave it out for " + ", ".join(usual))
    return names


def _enough(curve: Curve, sizes: Sequence[int]) -> int:
    """The least size that keeps enough, or the largest."""
    for size, error in zip(sizes, curve.errors, strict=True):
        if error is not None and 1 - error**2 >= ENOUGH:
            return size
    return sizes[-1]


def _spread(values: Sequence[float]) -> dict[str, float]:
    """The least, the quarters and the largest."""
    quarters = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    names = ("least", "25%", "median", "75%", "largest")
    return dict(zip(names, (min(values), *quarters, max(values)), strict=True))
