"""What an adapter for a change should be: the recommendation, and the numbers that it rests on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from textwrap import wrap
from typing import Any

from nerine.tables import table
from nerine.tools.extract.report import percent, shortened

__all__ = ["Advice", "Curve", "Share", "SuggestReport", "in_megabytes"]

MOST = 10  # lines of a table in the text
WIDTH = 80


@dataclass(frozen=True)
class Curve:
    """The relative error |W' - target|/|D| of one way at each of the sizes; None where it needs more bytes.

    `at` says which setting of all layers that is, where they have one in common.
    """

    name: str
    errors: tuple[float | None, ...]
    at: tuple[str, ...] = ()


@dataclass(frozen=True)
class Share:
    """Some layers together: their share of Σ|D|², how many they are, |D|/|W|, and their median effective rank."""

    name: str
    share: float
    layers: int
    relative: float | None
    directions: float


@dataclass(frozen=True)
class Advice:
    """What to use for a size: the algorithm with its settings, the same for all layers, and what it keeps; `spread` and
    `spread_error` are those where each layer gets its own (`nerine extract --size`). `without` are kinds of layers to
    leave out, which carry `lost` of the change together."""

    size: int
    algorithm: str
    error: float
    spread: str
    spread_error: float
    without: tuple[str, ...] = ()
    lost: float = 0.0
    command: str = ""
    attach: str = ""
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class SuggestReport:
    """What a change is like, and which adapter suits it. `str()` fits 80 columns, `to_dict()` is ready for JSON."""

    base: str
    other: str
    layers: int
    relative: float | None
    directions: Mapping[str, float]
    sizes: tuple[int, ...]
    curves: tuple[Curve, ...]
    blocks: tuple[Share, ...]
    kinds: tuple[Share, ...]
    advice: Advice
    left_out: float
    silent: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        spread = ", ".join(f"{name} {value:.1f}" for name, value in self.directions.items())
        relative = "" if self.relative is None else f", |D|/|W| = {self.relative:.3g}"
        lines = [
            f"{self.base} -> {self.other}" if self.base else self.other,
            f"{self.layers} layers have changed{relative}",
            f"effective ranks: {spread}",
            "",
            "relative error of the change by size, each layer its own:",
            _curves(self),
            "",
            f"share of the change by block (the {min(MOST, len(self.blocks))} largest of {len(self.blocks)}):",
            _shares(self.blocks),
            "",
            f"share of the change by kind of layer (the {min(MOST, len(self.kinds))} largest of {len(self.kinds)}):",
            _shares(self.kinds),
            "",
            *self._advice(),
        ]
        return "\n".join([*lines, *[f"note: {note}" for note in self.notes]])

    def _advice(self) -> list[str]:
        advice = self.advice
        found = [
            f"for {in_megabytes(advice.size)}: {advice.algorithm} on every layer keeps "
            f"{percent(1 - advice.error**2)} (relative error {advice.error:.3g})",
            f"spread over the layers, {advice.spread} keeps {percent(1 - advice.spread_error**2)} "
            f"(relative error {advice.spread_error:.3g})",
            *[f"- {reason}" for reason in advice.reasons],
        ]
        if self.silent:
            some = ", ".join(list(self.silent)[:4]) + (", ..." if len(self.silent) > 4 else "")
            less = percent(self.left_out)
            found.append(f"- these kinds carry less than {less} of it together and can be left out: {some}")
        wrapped = [line for text in found for line in wrap(text, WIDTH, subsequent_indent="  ")]
        return [*wrapped, "", advice.command, advice.attach]


def in_megabytes(size: int) -> str:
    """A round number of bytes, as one asks for it."""
    return f"{size / 10**6:g} MB"


def _curves(report: SuggestReport) -> str:
    head = ["size", *[curve.name for curve in report.curves]]
    rows = []
    for i, size in enumerate(report.sizes):
        found = [curve.errors[i] for curve in report.curves]
        rows.append([in_megabytes(size), *["-" if error is None else f"{error:.3g}" for error in found]])
    return table(head, rows)


def _shares(shares: tuple[Share, ...]) -> str:
    head = ["where", "share", "layers", "|D|/|W|", "eff. rank"]
    return table(
        head,
        [
            [
                shortened(share.name, 40),
                percent(share.share),
                share.layers,
                "" if share.relative is None else f"{share.relative:.2g}",
                f"{share.directions:.1f}",
            ]
            for share in shares[:MOST]
        ],
    )
