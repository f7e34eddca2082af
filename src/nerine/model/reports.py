"""What the work on a network reports: plain data, with a table for people and a dict for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from nerine.tables import table

__all__ = ["AttachReport", "MaxNorm", "MergeReport", "NormReport"]

LOSSY = 0.5  # a rounding error, relative to the change, above which a merge is said to lose the adapter


@dataclass(frozen=True)
class AttachReport:
    """What was put where: one row a layer, the layers left out with the reason, and notes."""

    rows: tuple[tuple[str, str, str, int], ...]  # layer, kind, algorithm, trained values
    skipped: Mapping[str, str] = field(default_factory=dict)
    frozen: int = 0  # base parameters that were set to requires_grad=False
    notes: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()  # adapted, but not executed while others were

    @property
    def params(self) -> int:
        return sum(row[3] for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "params": self.params}

    def __str__(self) -> str:
        rows = [(layer, kind, algorithm, f"{params:,}") for layer, kind, algorithm, params in self.rows]
        lines = [table(("layer", "kind", "algorithm", "params"), rows)]
        lines.append(f"{len(self.rows)} layers, {self.params:,} trained values, {self.frozen} base parameters frozen")
        lines += [f"left out: {path}: {why}" for path, why in self.skipped.items()]
        lines += [f"never executed: {path}: its adapter has no effect" for path in self.idle]
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class MergeReport:
    """Rounding of a merge, one row a layer: largest error of a weight, and error over change (both by norm)."""

    rows: tuple[tuple[str, float, float], ...]

    @property
    def lossy(self) -> tuple[str, ...]:
        """The layers where rounding is more than half as large as the change: most of the adapter is lost there."""
        return tuple(layer for layer, _, relative in self.rows if relative > LOSSY)

    @property
    def largest(self) -> float:
        return max((row[1] for row in self.rows), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        keys = ("layer", "max_error", "relative_error")
        layers = [dict(zip(keys, row, strict=True)) for row in self.rows]
        return {"largest": self.largest, "lossy": list(self.lossy), "layers": layers}

    def __str__(self) -> str:
        rows = [(layer, f"{error:.2e}", f"{relative:.2e}") for layer, error, relative in self.rows]
        shown = table(("layer", "largest rounding", "relative to the change"), rows)
        if not self.lossy:
            return shown
        named = ", ".join(self.lossy[:3]) + (", ..." if len(self.lossy) > 3 else "")
        return (
            f"{shown}\nrounding is more than {LOSSY:.0%} of the change in {len(self.lossy)} of {len(self.rows)} layers "
            f"({named}): the merged model is not the adapted one. Unmerge and keep the adapter beside, or merge into "
            "a base that is not quantised"
        )


@dataclass(frozen=True)
class MaxNorm:
    """What `Network.max_norm` did: how many adapters it shrank, and mean and largest |W' - W| afterwards."""

    shrunk: int
    mean: float
    largest: float


@dataclass(frozen=True)
class NormReport:
    """One row a layer: |W' - W|, |W|, and the norm of all gradients of its adapter (0 where there are none)."""

    rows: tuple[tuple[str, float, float, float], ...]

    def to_dict(self) -> dict[str, Any]:
        keys = ("layer", "deviation", "weight", "gradient")
        return {"layers": [dict(zip(keys, row, strict=True)) for row in self.rows]}

    def __str__(self) -> str:
        rows = [(path, f"{d:.3g}", f"{w:.3g}", f"{d / max(w, 1e-30):.2%}", f"{g:.3g}") for path, d, w, g in self.rows]
        return table(("layer", "|W' - W|", "|W|", "change", "|gradient|"), rows)
