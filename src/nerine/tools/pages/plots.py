"""The other pictures: sizes by depth, spectra, and how many layers have which effective rank."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import median, mode

from nerine.tools.inspect.report import InspectReport, LayerRow
from nerine.tools.inspect.text import number
from nerine.tools.pages.groups import GROUPS, group_of
from nerine.tools.pages.marks import Markup, joined, mark, words
from nerine.tools.pages.scales import Scale, linear, logarithmic, quantile

__all__ = ["depth_plot", "rank_histogram", "spectra_plot"]

BINS = 16
WIDE, TALL, LEFT, TOP, BOTTOM = 440.0, 290.0, 46.0, 10.0, 40.0  # of the smaller pictures


def _axis_y(scale: Scale, left: float, right: float) -> list[Markup]:
    drawn = []
    for tick in scale.ticks:
        y = scale(tick)
        drawn.append(mark("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
        drawn.append(mark("text", number(tick), x=left - 6, y=y + 4, class_="tick", text_anchor="end"))
    return drawn


def _picture(drawn: Sequence[Markup], wide: float, tall: float, label: str, class_: str = "") -> Markup:
    return mark(
        "svg", *drawn, viewBox=f"0 0 {wide:.0f} {tall:.0f}", role="img", aria_label=label, class_=class_ or None
    )


# -- by depth ----------------------------------------------------------------------------------------------------------
def depth_plot(report: InspectReport) -> Markup:
    """Every layer as a dot, from the first to the last, and the medians of the blocks as a line."""
    rows = report.rows
    sizes = [row.size for row in rows if row.size]
    if len(sizes) < 2:
        return Markup()
    wide, tall, left, top, bottom = 920.0, 300.0, 52.0, 12.0, 44.0
    y = logarithmic(sizes, tall - bottom, top)
    x = linear(0, max(len(rows) - 1, 1), left + 8, wide - 12)
    bad = {finding.layer for finding in report.findings}
    drawn = [*_axis_y(y, left, wide), *_stages(rows, x, tall - bottom, top), *_medians(rows, x, y)]
    for i, row in enumerate(rows):
        said = mark("title", words(f"{row.layer}: {number(row.size) or 'not a number'}", 240))
        place = {"cx": x(i), "cy": y(row.size) if row.size else tall - bottom, "r": 3.4 if row.layer in bad else 2.2}
        drawn.append(mark("circle", said, class_="bad" if row.layer in bad else _class(group_of(row)), **place))
    what = "relative change" if any(row.relative is not None for row in rows) else "norm of the change"
    label = f"{what} of {len(rows)} layers in the order of the model, from {number(min(sizes))} to {number(max(sizes))}"
    picture = _picture(drawn, wide, tall, label, "wide")
    holder = mark(
        "div", picture, class_="scroll", tabindex="0", role="region", aria_label="Sizes by depth, can be scrolled"
    )
    here = {group_of(row) for row in rows}
    key = [mark("span", mark("i", class_=f"dot {_class(g)}"), g) for g in GROUPS if g in here]
    key += [mark("span", mark("i", class_="dot bad"), "suspicious")] if bad else []
    key += [mark("span", mark("i", class_="stroke"), "median of the block")]
    return joined([holder, mark("p", *key, class_="legend")])


def _class(group: str) -> str:
    return f"g{GROUPS.index(group)}"


def _stages(rows: Sequence[LayerRow], x: Scale, low: float, high: float) -> list[Markup]:
    """Where one part of the model ends and the next begins, with their names where there is room."""
    drawn, half = [], (x(1) - x(0)) / 2
    for start, stop in _runs([_stage(row) for row in rows]):
        a, b = x(start) - half, x(stop - 1) + half
        if start:
            drawn.append(mark("line", x1=a, x2=a, y1=high, y2=low + 6, class_="grid"))
        room, name = int((b - a) / 6.6), _stage(rows[start])
        if room >= min(len(name), 8):
            text = name if len(name) <= room else name[: room - 1] + "…"
            drawn.append(mark("text", text, x=(a + b) / 2, y=low + 22, class_="tick", text_anchor="middle"))
    return drawn


def _runs(names: Sequence[object]) -> list[tuple[int, int]]:
    """Beginning and end of each run of the same name."""
    ends = [i for i in range(1, len(names)) if names[i] != names[i - 1]]
    return list(zip([0, *ends], [*ends, len(names)], strict=True))


def _stage(row: LayerRow) -> str:
    """The part of the model that a layer belongs to: a resolution of a UNet, a stack of blocks, a text encoder."""
    if row.component.startswith("text"):
        return row.component
    words = row.block.split(".")
    return ".".join(words[: 2 if words[0] in ("down_blocks", "up_blocks") else 1]) or "outside"


def _medians(rows: Sequence[LayerRow], x: Scale, y: Scale) -> list[Markup]:
    """One stroke a block, at the median of its layers."""
    drawn = []
    for start, stop in _runs([(row.component, row.block) for row in rows]):
        sizes = [row.size for row in rows[start:stop] if row.size]
        if rows[start].block and len(sizes) > 1:
            at = y(median(sizes))
            drawn.append(mark("line", x1=x(start), x2=x(stop - 1), y1=at, y2=at, class_="median"))
    return drawn


# -- spectra -----------------------------------------------------------------------------------------------------------
def spectra_plot(report: InspectReport) -> Markup:
    """σ_i/σ_1 of all layers as a band with its median, and three layers that stand for others."""
    rows = [row for row in report.rows if len(row.values) > 1 and row.values[0] > 0 and row.effective_rank]
    if not rows:
        return Markup()
    longest = max(len(row.values) for row in rows)
    curves = [[value / row.values[0] for value in row.values] for row in rows]
    bands = [[curve[i] for curve in curves if len(curve) > i] for i in range(longest)]
    floor = min(max(min(quantile(band, 0.1) for band in bands), 1e-5), 0.5)
    y = Scale(floor / 1.3, 1.0, TALL - BOTTOM, TOP, True)
    x = linear(1, longest, LEFT, WIDE - 10)
    low, middle, high = ([(x(i + 1), y(quantile(band, s))) for i, band in enumerate(bands)] for s in (0.1, 0.5, 0.9))
    usual = mode(row.limit for row in rows)
    ordered = sorted((row for row in rows if row.limit == usual), key=lambda row: row.effective_rank or 0.0)
    chosen = {"least": ordered[0], "middle": ordered[len(ordered) // 2], "most": ordered[-1]}
    drawn = [*_axis_y(y, LEFT, WIDE - 10), *_axis_x(x, TALL - BOTTOM)]
    drawn.append(mark("polygon", points=_points([*high, *reversed(low)]), class_="band"))
    for n, row in enumerate(chosen.values()):
        curve = [(x(i + 1), y(value / row.values[0])) for i, value in enumerate(row.values)]
        drawn.append(mark("polyline", points=_points(curve), class_=f"line l{n}"))
    drawn.append(mark("polyline", points=_points(middle), class_="line median"))
    label = f"Singular values relative to the largest, median and 80 % band over {len(rows)} layers"
    key = [mark("li", mark("i", class_="stroke median"), "median of all layers; shaded: 80 % of them")]
    for n, (which, row) in enumerate(chosen.items()):
        said = mark("span", f"{which} ranks used, {number(row.effective_rank)} of {row.limit}: ", class_="quiet")
        key.append(mark("li", mark("i", class_=f"stroke l{n}"), said, words(row.layer, 120)))
    return joined([_picture(drawn, WIDE, TALL, label), mark("ul", *key, class_="key")])


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in points)


# -- effective ranks ---------------------------------------------------------------------------------------------------
def rank_histogram(report: InspectReport) -> Markup:
    """How many layers have which effective rank."""
    ranks = [row.effective_rank for row in report.rows if row.effective_rank]
    if len(ranks) < 2:
        return Markup()
    edges, is_log = _bins(ranks)
    spans = list(itertools.pairwise(edges))
    counts = [sum(a <= rank < b for rank in ranks) for a, b in spans]
    low = TALL - BOTTOM
    x, y = Scale(edges[0], edges[-1], LEFT, WIDE - 10, is_log), linear(0, max(counts), low, TOP)
    drawn = [*_axis_y(y, LEFT, WIDE - 10), *_axis_x(x, low)]
    for (a, b), count in zip(spans, counts, strict=True):
        said = mark("title", f"{number(a)} to {number(b)}: {count} layers")
        size = {"width": max(x(b) - x(a) - 2, 1.0), "height": low - y(count)}
        drawn.append(mark("rect", said, x=x(a) + 1, y=y(count), class_="bar", **size))
    middle = median(ranks)
    drawn.append(mark("line", x1=x(middle), x2=x(middle), y1=TOP, y2=low, class_="median"))
    span = f"from {number(min(ranks))} to {number(max(ranks))}, median {number(middle)}"
    limits = [row.limit for row in report.rows if row.limit and row.effective_rank]
    most = f"{min(limits)}" if min(limits) == max(limits) else f"{min(limits)} to {max(limits)}"
    key = mark("li", mark("i", class_="stroke median"), f"median {number(middle)}; the layers can have {most}")
    label = f"Effective ranks of {len(ranks)} layers: {span}"
    return joined([_picture(drawn, WIDE, TALL, label), mark("ul", key, class_="key")])


def _axis_x(x: Scale, low: float) -> list[Markup]:
    return [mark("text", number(t), x=x(t), y=low + 16, class_="tick", text_anchor="middle") for t in x.ticks]


def _bins(ranks: Sequence[float]) -> tuple[list[float], bool]:
    """Ends of the bins, all of one width, or of one ratio where the ranks are far apart."""
    high = max(*ranks, 2.0) * 1.0001
    if high / min(ranks) > 30:
        return [high ** (i / BINS) for i in range(BINS + 1)], True
    step = next(s for s in (0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100) if (high - 1) / s <= BINS + 4)
    first = math.floor(min(ranks) / step)
    return [i * step for i in range(first, math.ceil(high / step) + 1)], False
