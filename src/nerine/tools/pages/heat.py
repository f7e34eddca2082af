"""The heat map: one row a block, one column a kind of layer, and the darker the larger its change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import NamedTuple

from nerine.tools.inspect.places import kinds_in_order
from nerine.tools.inspect.report import InspectReport, LayerRow
from nerine.tools.inspect.text import number, shortened
from nerine.tools.pages.groups import GROUPS, group_of
from nerine.tools.pages.marks import Markup, joined, mark, words
from nerine.tools.pages.scales import Scale, linear, without_strays

__all__ = ["heat_map"]

STEPS = 9  # colours of the ramp, `.h0` to `.h8` in the style sheet
MOST_KINDS = 28
CELL_H, GAP = 16, 2
WIDE, NARROWEST, WIDEST = 1000, 22, 40  # of all, and of one field
OTHER = "others"


class Cell(NamedTuple):
    """The layers of one kind in one block."""

    rows: tuple[LayerRow, ...]

    @property
    def value(self) -> float | None:
        known = [row.size for row in self.rows if row.size is not None]
        return median(known) if known else None


def heat_map(report: InspectReport, component: str) -> Markup:
    """The map of one part of a pipeline, with its legend; empty where it has one block alone."""
    cells = _cells(report, component)
    named = {block for block, _ in cells}
    blocks = [block.name for block in report.blocks if block.component == component and block.name in named]
    values = [cell.value for cell in cells.values() if cell.value]
    if len(blocks) < 2 or not values:
        return Markup()
    scale, what = _ramp(values), _what(report)
    label = f"Heat map of the {component or 'model'}: {what}, {len(blocks)} blocks by kinds of layers"
    picture = _picture(blocks, _kinds(cells), cells, scale, label)
    holder = mark("div", picture, class_="scroll", tabindex="0", role="region", aria_label=f"{label}, can be scrolled")
    return joined([holder, _legend(scale, what)])


def _picture(
    blocks: list[str], kinds: list[str], cells: Mapping[tuple[str, str], Cell], scale: Scale, label: str
) -> Markup:
    left = 12 + 6.4 * max(len(shortened(block, 34)) for block in blocks)
    top = 12 + 6.2 * max(len(shortened(kind, 26)) for kind in kinds) * math.sin(math.radians(60))
    side = min(max((WIDE - left - 60) / len(kinds) - GAP, NARROWEST), WIDEST)
    drawn: list[Markup] = []
    right = left + len(kinds) * (side + GAP)
    for i, kind in enumerate(kinds):
        x = left + i * (side + GAP) + side / 2
        right = max(right, x + 3.2 * len(shortened(kind, 26)) + 6)
        turn = f"rotate(-60 {x:.0f} {top - 6:.0f})"
        drawn.append(mark("text", shortened(kind, 26), x=x, y=top - 6, class_="tick", transform=turn))
    for j, block in enumerate(blocks):
        y = top + j * (CELL_H + GAP)
        drawn.append(mark("text", shortened(block, 34), x=left - 8, y=y + 12, class_="tick", text_anchor="end"))
        for i, kind in enumerate(kinds):
            cell = cells.get((block, kind))
            if cell is not None:
                drawn.append(_field(cell, f"{block} · {kind}", (left + i * (side + GAP), y, side), scale))
    tall, wide = f"{top + len(blocks) * (CELL_H + GAP) + 4:.0f}", f"{right:.0f}"
    return mark("svg", *drawn, viewBox=f"0 0 {wide} {tall}", width=wide, height=tall, role="img", aria_label=label)


def _cells(report: InspectReport, component: str) -> dict[tuple[str, str], Cell]:
    """{(block, kind): its layers}. Layers outside of any block are no cells; rare kinds share a column."""
    own = [row for row in report.rows if row.component == component and row.block]
    blocks_with: dict[str, set[str]] = {}
    for row in own:
        blocks_with.setdefault(row.kind, set()).add(row.block)
    often = sorted(blocks_with, key=lambda kind: -len(blocks_with[kind]))[:MOST_KINDS]
    found: dict[tuple[str, str], list[LayerRow]] = {}
    for row in own:
        found.setdefault((row.block, row.kind if row.kind in often else OTHER), []).append(row)
    return {place: Cell(tuple(rows)) for place, rows in found.items()}


def _kinds(cells: Mapping[tuple[str, str], Cell]) -> list[str]:
    """The columns: what belongs together side by side, attention first."""
    groups: dict[str, set[str]] = {}
    for (_, kind), cell in cells.items():
        groups.setdefault(OTHER if kind == OTHER else group_of(cell.rows[0]), set()).add(kind)
    return [kind for group in (*GROUPS, OTHER) for kind in kinds_in_order(groups.get(group, ()))]


def _what(report: InspectReport) -> str:
    relative = any(row.relative is not None for row in report.rows)
    return "change relative to the weight" if relative else "norm of the change"


def _ramp(values: list[float]) -> Scale:
    """Logarithmic where the values are far apart."""
    low, high = without_strays(values)
    if high / low > 12:
        return Scale(low, high, 0, STEPS - 1, True)
    return linear(0.0, high, 0, STEPS - 1)


def _field(cell: Cell, name: str, place: tuple[float, float, float], scale: Scale) -> Markup:
    value = cell.value
    is_bad = any(row.not_finite for row in cell.rows) or not value
    several = f" (median of {len(cell.rows)} layers)" if len(cell.rows) > 1 else ""
    said = mark("title", words(f"{name}: {'not a number' if value is None else number(value)}{several}", 200))
    x, y, side = place
    step = "bad" if is_bad else f"h{round(scale(value or 0.0))}"
    return mark("rect", said, x=x, y=y, width=side, height=CELL_H, rx=2, class_=f"cell {step}")


def _legend(scale: Scale, what: str) -> Markup:
    boxes = mark("span", *(mark("i", class_=f"swatch h{step}") for step in range(STEPS)), class_="ramp")
    ends = [mark("span", number(scale.low) if scale.is_log else "0"), boxes, mark("span", number(scale.high))]
    note = " (logarithmic)" if scale.is_log else ""
    return mark("p", mark("span", f"{what}{note}", class_="quiet"), *ends, class_="legend")
