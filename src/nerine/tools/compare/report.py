"""What a comparison found, as plain data and as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nerine.tables import table
from nerine.tools.inspect.text import number, printable, shortened

__all__ = ["CompareReport", "CompareRow", "Together", "cosine_of"]

SHOWN = 12


@dataclass(frozen=True)
class CompareRow:
    """One layer in both files: sizes of the two changes, and how they lie to each other.

    `distance` is |A - B| / max(|A|, |B|), `cosine` that of the angle between them as long vectors. `overlap_out` and
    `overlap_in` are the mean squared cosines of the principal angles between their leading `directions` output and
    input directions. `bias_distance` is that of what they add to the bias. None is unknown or not there; `why` says the
    reason.
    """

    layer: str
    component: str
    block: str
    algorithms: tuple[str, str]
    norm_a: float | None = None
    norm_b: float | None = None
    product: float | None = None
    cosine: float | None = None
    distance: float | None = None
    overlap_out: float | None = None
    overlap_in: float | None = None
    directions: int = 0
    bias_distance: float | None = None
    same_tensors: bool = False
    why: str = ""

    @property
    def ratio(self) -> float | None:
        """|B| / |A|."""
        return self.norm_b / self.norm_a if self.norm_a and self.norm_b is not None else None


@dataclass(frozen=True)
class Together:
    """Several layers as one long vector."""

    name: str
    layers: int
    cosine: float | None
    ratio: float | None
    distance: float | None


@dataclass(frozen=True)
class CompareReport:
    """How two files compare.

    `identical` is "files" (the same bytes), "tensors" (other metadata), "numbers" (the same changes, however they are
    written), or "". `only_a` and `only_b` are layers that one of them lacks; `how` says by what they were matched.
    """

    a: str
    b: str
    rows: tuple[CompareRow, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    identical: str = ""
    how: str = ""
    base: str = ""
    notes: tuple[str, ...] = ()

    @property
    def together(self) -> Together:
        """All layers that could be compared."""
        return _together("all", self.rows)

    @property
    def blocks(self) -> tuple[Together, ...]:
        """Block by block, those that differ most first."""
        found: dict[str, list[CompareRow]] = {}
        for row in self.rows:
            found.setdefault(" ".join(part for part in (row.component, row.block) if part) or row.layer, []).append(row)
        blocks = [_together(name, rows) for name, rows in found.items()]
        return tuple(sorted(blocks, key=lambda block: -(block.distance or 0.0)))

    @property
    def largest(self) -> float | None:
        """The largest distance of a layer; 1 where a layer is in one file alone, None where one could not be told."""
        known = [row.distance for row in self.rows if row.distance is not None]
        if len(known) < len(self.rows):
            return None
        alone = 1.0 if self.only_a or self.only_b else 0.0
        return max([alone, *known, *(row.bias_distance or 0.0 for row in self.rows)])

    def to_dict(self) -> dict[str, Any]:
        rows = [{**asdict(row), "ratio": row.ratio} for row in self.rows]
        more = {
            "largest": self.largest,
            "together": asdict(self.together),
            "blocks": [asdict(block) for block in self.blocks],
        }
        return {**asdict(self), "rows": rows, **more}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def cosine_of(product: float, norm_a: float, norm_b: float) -> float | None:
    """That of the angle between two vectors; None where one of them is zero."""
    return max(-1.0, min(1.0, product / (norm_a * norm_b))) if norm_a and norm_b else None


def _together(name: str, rows: Sequence[CompareRow]) -> Together:
    known = [row for row in rows if row.product is not None]
    if not known:
        return Together(
            name, len(rows), None, None, max((r.distance for r in rows if r.distance is not None), default=None)
        )
    a, b = (math.hypot(*(getattr(row, side) or 0.0 for row in known)) for side in ("norm_a", "norm_b"))
    apart = math.hypot(*((r.distance or 0.0) * max(r.norm_a or 0.0, r.norm_b or 0.0) for r in known))
    cosine = cosine_of(sum(row.product or 0.0 for row in known), a, b)
    return Together(name, len(rows), cosine, b / a if a else None, apart / max(a, b) if max(a, b) else 0.0)


# -- text --------------------------------------------------------------------------------------------------------------
_IDENTICAL = {
    "files": "the two files are the same, byte for byte",
    "tensors": "all tensors are the same, bit for bit; the metadata differs",
    "numbers": "all layers change the same numbers by the same amounts",
}
_HEAD = ("cosine", "B/A", "distance")


def _lines(report: CompareReport) -> Iterable[str]:
    yield f"A  {printable(report.a, 300)}"
    yield f"B  {printable(report.b, 300)}"
    whole = report.together
    yield f"{len(report.rows)} layers in both, matched by {report.how}"
    if report.identical:
        yield _IDENTICAL[report.identical]
    else:
        yield (
            f"together: cosine {_share(whole.cosine) or '-'}, |B|/|A| {number(whole.ratio) or '-'}, "
            f"distance {number(whole.distance) or '-'}"
        )
    for name, paths in (("A", report.only_a), ("B", report.only_b)):
        if paths:
            shown = ", ".join(shortened(path, 50) for path in paths[:3])
            yield f"only in {name}: {len(paths)} layers ({shown}{', ...' if len(paths) > 3 else ''})"
    yield from (printable(note, 300) for note in report.notes)
    known = [row for row in report.rows if row.distance is not None]
    if known and not report.identical:
        yield ""
        yield "Blocks that differ most"
        blocks = [block for block in report.blocks if block.distance is not None][:SHOWN]
        yield table(("block", "layers", *_HEAD), [(shortened(b.name, 42), b.layers, *_numbers(b)) for b in blocks])
        yield ""
        yield "Layers that differ most"
        yield _layers(known)
    unknown = [row for row in report.rows if row.distance is None]
    if unknown:
        yield ""
        yield f"not compared: {len(unknown)} layers (first {shortened(unknown[0].layer, 60)}: {unknown[0].why})"


def _layers(rows: Sequence[CompareRow]) -> str:
    most = sorted(rows, key=lambda row: -(row.distance or 0.0))[:SHOWN]
    head = ("layer", *_HEAD, "outputs", "inputs")
    return table(
        head,
        [(_short(r), *_numbers(r), _share(r.overlap_out), _share(r.overlap_in)) for r in most],
    )


def _short(row: CompareRow) -> str:
    lead = row.layer.partition(".")[0] if row.component else ""
    return shortened(row.layer[len(lead) + 1 :] if lead else row.layer, 36)


def _numbers(one: CompareRow | Together) -> tuple[str, str, str]:
    return _share(one.cosine), number(one.ratio), number(one.distance)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
