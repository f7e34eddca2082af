"""From the numbers to a recommendation, and to what one types to follow it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from nerine.tools.suggest.report import Advice, Curve, in_megabytes
from nerine.tools.suggest.weighing import Scales, Uniform, fitting, kind_of

__all__ = ["Where", "advise"]

BETTER = 0.95  # a choice among algorithms is worth it where its error is below this part of the best single one's
SLIGHT = 1e-3  # a gain below this part of the change is worth no second algorithm
FORMATS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Where:
    """What was looked at, and how it is to be written."""

    base: str | os.PathLike[str] | None
    tuned: str | os.PathLike[str] | None
    adapter: str | os.PathLike[str] | None
    dtype: torch.dtype
    dialect: str


def advise(
    scales: Scales,
    rows: Mapping[str, Sequence[Uniform]],
    curves: Sequence[Curve],
    sizes: Sequence[int],
    size: int,
    quiet: Mapping[str, float],
    where: Where,
) -> Advice:
    """The recommendation for a size."""
    fits = {name: row for name, own in rows.items() if (row := fitting(own, size)) is not None}
    if not fits:  # nothing fits on all layers: the smallest that there is
        fits = {name: own[0] for name, own in rows.items()}
    name, best = min(fits.items(), key=lambda item: (item[1].error, item[1].bytes))
    at = list(sizes).index(size)
    spreads = {c.name: e for c in curves if (e := c.errors[at]) is not None and "," not in c.name}
    singles = {key: error for key, error in spreads.items() if key != "auto"}
    single = min(singles, key=lambda key: singles[key], default=name)
    auto = spreads.get("auto", 1.0)
    alone = singles.get(single, 1.0)
    worth = "auto" if auto < min(BETTER * alone, alone - SLIGHT) else single
    error = scales.relative(best.error)
    without = tuple(kind for kind in quiet if _is_pattern(kind, scales))
    return Advice(
        size=size,
        algorithm=best.text,
        error=error,
        spread=worth,
        spread_error=spreads.get(worth, 1.0),
        without=without,
        lost=sum(quiet[kind] for kind in without),
        command=_command(where, worth, rows, size),
        attach=_attach(best, without),
        reasons=tuple(_reasons(scales, fits, spreads, size)),
    )


def _reasons(scales: Scales, fits: Mapping[str, Uniform], spreads: Mapping[str, float], size: int) -> list[str]:
    told = ", ".join(
        f"{row.text} leaves {scales.relative(row.error):.3g}"
        for row in sorted(fits.values(), key=lambda row: row.error)[:4]
    )
    found = [f"at {in_megabytes(size)}, the same on every layer, {told}"]
    if len(spreads) > 1:
        ordered = sorted(spreads.items(), key=lambda item: item[1])
        found.append("spread over the layers, " + ", ".join(f"{name} leaves {error:.3g}" for name, error in ordered))
    ranks = sorted(layer.directions for layer in scales.layers)
    half = median(ranks)
    found.append(f"half of the layers have an effective rank of at most {half:.1f}, the largest {ranks[-1]:.1f}")
    change = sorted((layer.change for layer in scales.layers), reverse=True)
    tenth = max(1, len(change) // 10)
    found.append(f"the {tenth} layers that changed most carry {sum(change[:tenth]) / scales.total:.0%} of the change")
    return found


def _is_pattern(kind: str, scales: Scales) -> bool:
    """Whether the words of a kind stand one after the other in the paths of its layers, and in no others."""
    whole = re.compile(rf"(^|\.){re.escape(kind)}(\.|$)")
    return all(bool(whole.search(layer.path)) == (kind_of(layer.path) == kind) for layer in scales.layers)


def _command(where: Where, worth: str, rows: Mapping[str, Sequence[Uniform]], size: int) -> str:
    """What makes such a file: out of the checkpoints, or out of the adapter that was looked at."""
    told = [] if where.dialect == "kohya" else ["--dialect", where.dialect]
    form = ["--dtype", FORMATS.get(where.dtype, "fp16"), *told]
    spent = ["--size", f"{size / 10**6:g}MB", *form]
    name = "lora" if worth == "auto" and "lora" in rows else worth
    if where.adapter is None:
        words = ["nerine", "extract", where.base, where.tuned, "-o", "adapter.safetensors", "--algo", worth, *spent]
    elif name == "lora":
        words = ["nerine", "resize", where.adapter, "-o", "adapter.safetensors", *spent]
    else:
        best = fitting(rows[name], size) or rows[name][0]
        given = [f"--set {key}={value.lower()}" for key, value in re.findall(r"(\w+)=(\w+)", best.text)]
        given = [word for pair in given for word in pair.split(" ", 1)]
        words = ["nerine", "convert", where.adapter, "-o", "adapter.safetensors", "--to", name, *given, *form]
    return " ".join(shlex.quote(os.fspath(word)) for word in words if word is not None)


def _attach(best: Uniform, without: Sequence[str]) -> str:
    chosen = "" if not without else ", targets=" + repr(["all", *(f"!{kind}" for kind in without)])
    return f"nerine.attach(model, nerine.{best.text}{chosen})"
