"""What a verification found, as plain data: promise by promise, layer by layer, and program by program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nerine.errors import shown
from nerine.files.reports import ReaderRow
from nerine.tables import table

__all__ = ["LayerCheck", "Promise", "VerifyReport", "brief"]


@dataclass(frozen=True)
class LayerCheck:
    """The figures of one layer, all relative.

    `change` is |W' - W|/|W|. `trained` is how far training and merge are apart, over the change, in fp32 (`trained64`:
    in fp64, where that was computed); None where the layer computes with the changed weight itself. `lost` is the share
    of the change that rounding to the base's format takes. `reloaded` says by dialect how far W' is off after it was
    written and read again, over the change; 0 is bit for bit. `problems` are what does not hold.
    """

    layer: str
    algorithm: str
    change: float
    trained: float | None = None
    trained64: float | None = None
    lost: float | None = None
    reloaded: Mapping[str, float] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Promise:
    """One promise: for how many of the layers that it is about it was checked, the largest figure and where that is.

    `why` says what was left out.
    """

    name: str
    holds: bool
    layers: int
    of: int
    worst: float | None = None
    at: str = ""
    why: str = ""


@dataclass(frozen=True)
class VerifyReport:
    """Whether the promises hold for one file. `str()` is a few tables, `to_dict()` is ready for JSON.

    `findings` are what is wrong with the file or does not fit the base; with any, it does not hold. `notes` are what
    one should know. `lost` is the share of the whole change that rounding takes in a merge.
    """

    file: str
    base: str
    dialect: str
    format: str
    layers: tuple[LayerCheck, ...]
    promises: tuple[Promise, ...]
    readers: tuple[ReaderRow, ...] = ()
    findings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    lost: float | None = None

    @property
    def holds(self) -> bool:
        return not self.findings and all(promise.holds for promise in self.promises)

    def to_dict(self) -> dict[str, Any]:
        return {"holds": self.holds, **asdict(self)}

    def by_layer(self) -> str:
        """A table of all layers."""
        rows = [
            (
                brief(row.layer, 52),
                f"{row.change:.2%}",
                _figure(row.trained),
                _figure(row.trained64),
                "" if row.lost is None else f"{row.lost:.1%}",
                _figure(max(row.reloaded.values(), default=None)),
                "; ".join(row.problems),
            )
            for row in self.layers
        ]
        return table(("layer", "change", "train-merge", "in fp64", "rounding", "reload", "problem"), rows)

    def __str__(self) -> str:
        lines = [f"{self.file} ({self.dialect}, {len(self.layers)} layers) on {self.base} ({self.format})", ""]
        rows = [
            (
                p.name,
                "NO" if not p.holds else "yes" if p.layers else "-",
                p.layers if p.layers in (0, p.of) else f"{p.layers} of {p.of}",
                _figure(p.worst),
                brief(p.at, 42) or brief(p.why, 50, False),
            )
            for p in self.promises
        ]
        lines.append(table(("promise", "holds", "layers", "worst", "where, or why not"), rows))
        if self.readers:
            lines += ["", *_readers(self.readers)]
        wrong = [row for row in self.layers if row.problems]
        lines += [""] if self.findings or self.notes or wrong else []
        lines += [f"does not hold: {finding}" for finding in self.findings]
        lines += [f"does not hold: {shown(row.layer)}: {'; '.join(row.problems)}" for row in wrong[:5]]
        lines += [f"... and {len(wrong) - 5} layers more"] if len(wrong) > 5 else []
        lines += [f"note: {note}" for note in self.notes]
        verdict = "train = merge = export = reload: "
        return "\n".join([*lines, "", verdict + ("holds" if self.holds else "DOES NOT HOLD")])


def brief(text: str, longest: int, from_end: bool = True) -> str:
    """A text that fits a column: of a path the end tells most, of a sentence the beginning."""
    text = shown(text, 10_000)
    if len(text) <= longest:
        return text
    return f"...{text[3 - longest :]}" if from_end else f"{text[: longest - 3]}..."


def _figure(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def _off(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}" if share < 10 else f"{share:,.0f} x"


def _readers(rows: Sequence[ReaderRow]) -> list[str]:
    head = ("read by", "exactly", "approximately", "not at all", "off by")
    body = [(r.reader, r.exactly, r.approximately, r.not_at_all, _off(r.worst)) for r in rows]
    lines = [table(head, body)]
    for row in rows:
        if row.why and row.exactly + row.approximately:
            better = f"; better as {row.better}" if row.better else ""
            lines.append(f"{row.reader}: {row.why}{better}")
    return lines
