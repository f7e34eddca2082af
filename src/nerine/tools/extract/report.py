"""What an extraction made: the adapter of each layer, how much of the change it keeps, and what was left out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from nerine.tables import table

__all__ = ["ExtractReport", "Extracted", "counted", "megabytes", "percent", "shortened"]

WORST = 20  # layers in the text
WIDTH = 80


@dataclass(frozen=True)
class Extracted:
    """The adapter of one layer.

    `change` is |D| over all entries of D = (weight in the second) - (weight in the first), `relative` |D|/|W|, `error`
    |W' - weight in the second| / |D| of the tensors as they are written: 0 is exact, 1 as good as no adapter.
    `planned` is the error that was expected where options were weighed against each other.
    """

    layer: str
    algorithm: str
    settings: Mapping[str, Any]
    shape: tuple[int, ...]
    rank: int | None
    bytes: int
    change: float
    relative: float
    error: float
    planned: float | None = None

    @property
    def kept(self) -> float:
        """The share of the squares of D that the adapter brings."""
        return 1 - self.error**2


@dataclass(frozen=True)
class ExtractReport:
    """What was extracted. `str()` fits into 80 columns and shows the layers with the largest errors, `verbose()` all;
    `to_dict()` is ready for JSON.

    `error` is √Σ|W' - weight in the second|² / √Σ|D|² over all layers that differ, those left out included. `identical`
    counts layers without a difference (see `threshold`), `small` those below `min_change`, `left` {layer: reason} the
    others without an adapter. `biases` and `norms` count what has changed and has no place in the file, with its size
    relative to what it changed.
    """

    base: str
    tuned: str
    file: str
    dialect: str
    wanted: str
    dtype: str
    rows: tuple[Extracted, ...]
    size: int
    error: float
    change: float
    relative: float
    identical: int = 0
    threshold: str = ""
    small: int = 0
    min_change: float = 0.0
    left: Mapping[str, str] = field(default_factory=dict)
    biases: int = 0
    bias_change: float = 0.0
    norms: int = 0
    norm_change: float = 0.0
    notes: tuple[str, ...] = ()
    written: bool = True

    @property
    def layers(self) -> int:
        return len(self.rows)

    @property
    def parameters_bytes(self) -> int:
        """Bytes of the tensors alone."""
        return sum(row.bytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        more = {"layers": self.layers, "algorithms": counted(row.algorithm for row in self.rows)}
        rows = [{**asdict(row), "kept": row.kept} for row in self.rows]
        return {**asdict(self), **more, "rows": rows}

    def __str__(self) -> str:
        return self._text(WORST)

    def verbose(self) -> str:
        """As `str()`, with all layers."""
        return self._text(None)

    def _text(self, most: int | None) -> str:
        done = f"{self.file} ({self.dialect})" if self.written else f"{self.file} ({self.dialect}), not written"
        lines = [
            f"{self.base} -> {self.tuned}",
            f"{done}: {megabytes(self.size)}, {self.layers} layers, {self.wanted}, {self.dtype}",
            f"kept: {percent(1 - self.error**2)} of the change (relative error {self.error:.3g}); "
            f"|D|/|W| = {self.relative:.3g}",
            "algorithms: "
            + (", ".join(f"{n} x {k}" for k, n in counted(r.algorithm for r in self.rows).items()) or "-"),
            *self._left_out(),
            *[f"note: {note}" for note in self.notes],
        ]
        if not self.rows:
            return "\n".join(lines)
        rows = sorted(self.rows, key=lambda row: -row.error)[:most] if most is not None else self.rows
        title = f"the {len(rows)} of {self.layers} layers with the largest errors" if most is not None else "all layers"
        return "\n".join([*lines, "", f"{title}:", table_of(rows)])

    def _left_out(self) -> list[str]:
        lines = []
        if self.identical:
            lines.append(f"identical layers: {self.identical} ({self.threshold})")
        if self.small:
            lines.append(f"changed by at most {self.min_change:g} of their size, left out: {self.small}")
        for reason, paths in _by_reason(self.left).items():
            lines.append(f"left out: {len(paths)} ({reason}), first {shortened(paths[0], 40)}")
        if self.biases:
            lines.append(
                f"biases that changed and have no place here: {self.biases}, by {self.bias_change:.3g} of their size"
            )
        if self.norms:
            lines.append(f"norms that changed and were left out: {self.norms}, by {self.norm_change:.3g} of their size")
        return lines


def table_of(rows: Iterable[Extracted]) -> str:
    """One line a layer."""
    head = ["layer", "algorithm", "kB", "|D|/|W|", "error"]
    cells = [
        [
            shortened(row.layer, 36),
            row.algorithm if len(row.algorithm) <= 18 else row.algorithm[:17] + "…",
            f"{row.bytes / 1000:.1f}",
            f"{row.relative:.2g}",
            f"{row.error:.2g}",
        ]
        for row in rows
    ]
    return table(head, cells)


def shortened(text: str, most: int) -> str:
    """The end of a path, where it is too long."""
    return text if len(text) <= most else "…" + text[-most + 1 :]


def counted(words: Iterable[str]) -> dict[str, int]:
    """{word: how often}, the most frequent first."""
    found: dict[str, int] = {}
    for word in words:
        found[word] = found.get(word, 0) + 1
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def megabytes(size: int) -> str:
    return f"{size / 10**6:.2f} MB" if size >= 10**5 else f"{size:,} bytes"


def percent(share: float) -> str:
    """With as many digits as tell it from 100 %."""
    if not math.isfinite(share) or share >= 1:
        return "100%" if share >= 1 else "-"
    if share > 1 - 1e-6:
        return ">99.9999%"
    return f"{100 * share:.1f}%" if share < 0.999 else f"{100 * share:.4f}%"


def _by_reason(left: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path, why in left.items():
        found.setdefault(why, []).append(path)
    return found
