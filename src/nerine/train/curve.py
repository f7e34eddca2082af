"""The curve of a run, its loss and learning rate over the steps: as SVG for a page, or through matplotlib as a PNG.

The loss of a diffusion model jumps with the times that are drawn, so what is to be read is the moving average; the
steps themselves stand faint behind it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nerine.errors import FormatError, MissingExtra
from nerine.files.atomic import replacing
from nerine.tools.inspect.text import number, printable
from nerine.tools.pages.marks import Markup, joined, mark
from nerine.tools.pages.scales import Scale, linear, quantile
from nerine.train.history import History

__all__ = ["Smoothing", "curve_svg", "draw_curve", "is_empty", "smoothing"]

LEAST_SPAN, PARTS = 10, 40  # the average is over about a 40th of the run, and 10 steps at least
MOST_POINTS = 1200  # of a line on a page; longer ones are drawn by the least and the largest of each piece
FAR = 20.0  # from the least to the largest: from here on the axis is logarithmic

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Smoothing:
    """The exponential moving average of losses, divided by the sum of its weights, so that its beginning does not lean
    towards zero. `span` is 1/(1 - decay) steps; values that are not finite are left out."""

    points: tuple[tuple[int, float], ...]
    span: int

    @property
    def decay(self) -> float:
        return 1 - 1 / self.span

    @property
    def last(self) -> float | None:
        return self.points[-1][1] if self.points else None

    def __str__(self) -> str:
        return f"moving average (decay {self.decay:.3f}, about {self.span} steps)"


def smoothing(losses: Sequence[tuple[int, float]]) -> Smoothing:
    """The moving average of a run's losses, over more steps the longer the run."""
    finite = _finite(losses)
    span = max(LEAST_SPAN, round(len(finite) / PARTS))
    decay, total, weight = 1 - 1 / span, 0.0, 0.0
    points = []
    for step, loss in finite:
        total = decay * total + (1 - decay) * loss
        weight = decay * weight + (1 - decay)
        points.append((step, total / weight))
    return Smoothing(tuple(points), span)


@dataclass(frozen=True)
class _Curves:
    """What is drawn: all values finite, but for the steps of `broken`."""

    losses: Points
    average: Smoothing
    broken: tuple[int, ...]
    validation: Points
    validation_ema: Points
    rates: Points

    @classmethod
    def of(cls, history: History) -> _Curves:
        losses = history.losses()
        return cls(
            losses=_finite(losses),
            average=smoothing(losses),
            broken=tuple(step for step, loss in losses if not math.isfinite(loss)),
            validation=_finite(history.validations()),
            validation_ema=_finite(history.validations(ema=True)),
            rates=_finite(history.column("lr")),
        )

    @property
    def steps(self) -> tuple[int, int]:
        every = [step for points in (self.losses, self.validation) for step, _ in points] + list(self.broken)
        return min(every), max(every)

    @property
    def told(self) -> tuple[float, float]:
        """The least and the largest of what must be seen whole: validations, and averages once they are of several."""
        average = self.average.points[min(self.average.span, len(self.average.points)) // 2 :]
        values = [value for points in (average, self.validation, self.validation_ema) for _, value in points]
        return min(values), max(values)

    @property
    def limits(self) -> tuple[float, float]:
        """The axis: all that must be seen whole, and 98 % of the steps."""
        values = [value for _, value in self.losses]
        low, high = self.told
        if values:
            low, high = min(low, quantile(values, 0.01)), max(high, quantile(values, 0.99))
        if self.is_log:
            low = max(low, self.told[0] / 4)
            return low / 1.1, high * 1.1
        air = 0.04 * ((high - low) or abs(high) or 1.0)
        return (max(low - air, 0.0) if low >= 0 else low - air), high + air

    @property
    def is_log(self) -> bool:
        low, high = self.told
        return low > 0 and high / low > FAR

    @property
    def is_empty(self) -> bool:
        return not (self.losses or self.validation or self.validation_ema)


def is_empty(history: History) -> bool:
    """Whether there is nothing to draw: no finite loss, of a step or a validation."""
    return _Curves.of(history).is_empty


def _finite(points: Sequence[tuple[int, float]]) -> Points:
    return [(step, value) for step, value in points if math.isfinite(value)]


# -- on a page ---------------------------------------------------------------------------------------------------------
WIDE, TALL, LEFT, RIGHT = 920.0, 400.0, 56.0, 908.0
TOP, BOTTOM = 14.0, 282.0  # of the losses
RATE_TOP, RATE_BOTTOM = 312.0, 364.0  # of the learning rate


def curve_svg(history: History) -> Markup:
    """The curve as it stands in a page, with its legend; nothing where no step has a finite loss. Colours are classes
    of the page's style sheet."""
    found = _Curves.of(history)
    if found.is_empty:
        return Markup()
    x = linear(*found.steps, LEFT + 6, RIGHT - 6)
    y = Scale(*found.limits, BOTTOM, TOP, found.is_log)
    drawn = [mark("text", "loss" + (", logarithmic" if found.is_log else ""), x=LEFT, y=TOP - 3, class_="tick")]
    for tick in y.ticks:
        drawn.append(mark("line", x1=LEFT, x2=RIGHT, y1=y(tick), y2=y(tick), class_="grid"))
        drawn.append(mark("text", f"{tick:g}", x=LEFT - 7, y=y(tick) + 4, class_="tick", text_anchor="end"))
    drawn.append(_line(_thinned(found.losses), x, y, "line raw"))
    drawn += [mark("line", x1=x(step), x2=x(step), y1=TOP, y2=TOP + 9, class_="broken") for step in found.broken[:200]]
    drawn.append(_line(_thinned(found.average.points), x, y, "line average"))
    drawn += _validation(found.validation_ema, x, y, "ema") + _validation(found.validation, x, y, "held")
    drawn += _rates(found, x)
    shown = mark(
        "svg", *drawn, viewBox=f"0 0 {WIDE:.0f} {TALL:.0f}", role="img", aria_label=_label(found), class_="wide"
    )
    holder = {"class_": "scroll", "tabindex": "0", "role": "region", "aria_label": "Curve of the loss, can be scrolled"}
    return joined([mark("div", shown, **holder), _legend(found)])


def _label(found: _Curves) -> str:
    low, high = found.steps
    average = found.average.points
    text = f"Loss from step {low} to {high}"
    if average:
        text += f": the moving average goes from {number(average[0][1])} to {number(average[-1][1])}"
    return text + (f"; {len(found.validation)} validations" if found.validation else "")


def _line(points: Sequence[tuple[int, float]], x: Scale, y: Scale, class_: str) -> Markup:
    way = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    return mark("polyline", points=way, class_=class_) if points else Markup()


def _thinned(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    """No more than can be seen: the least and the largest of each piece of a long line, in their order."""
    size = math.ceil(2 * len(points) / MOST_POINTS)
    if size <= 2:
        return points
    kept: Points = []
    for start in range(0, len(points), size):
        piece = points[start : start + size]
        kept += sorted({min(piece, key=lambda p: p[1]), max(piece, key=lambda p: p[1])})
    return kept


def _validation(points: Points, x: Scale, y: Scale, class_: str) -> list[Markup]:
    drawn = [_line(points, x, y, f"line {class_}")]
    for step, value in points:
        said = mark("title", f"step {step}: {number(value)}")
        drawn.append(mark("circle", said, cx=x(step), cy=y(value), r=4.0, class_=class_))
    return drawn


def _rates(found: _Curves, x: Scale) -> list[Markup]:
    """The second panel: the learning rate, from zero on; below it the steps, which belong to both."""
    low, high = found.steps
    drawn = []
    if found.rates:
        y = linear(0.0, max(rate for _, rate in found.rates), RATE_BOTTOM, RATE_TOP)
        drawn.append(mark("text", "learning rate", x=LEFT, y=RATE_TOP - 7, class_="tick"))
        for tick in (y.low, y.high):
            drawn.append(mark("line", x1=LEFT, x2=RIGHT, y1=y(tick), y2=y(tick), class_="grid"))
            drawn.append(mark("text", number(tick), x=LEFT - 7, y=y(tick) + 4, class_="tick", text_anchor="end"))
        drawn.append(_line(_thinned(found.rates), x, y, "line rate"))
    at = (RATE_BOTTOM if found.rates else BOTTOM) + 18
    whole = [tick for tick in linear(low, high, 0, 1).ticks if tick == int(tick)]
    ticks = [mark("text", f"{tick:,.0f}", x=x(tick), y=at, class_="tick", text_anchor="middle") for tick in whole]
    return [*drawn, *ticks, mark("text", "step", x=RIGHT, y=at + 15, class_="tick", text_anchor="end")]


def _legend(found: _Curves) -> Markup:
    parts = [
        ("raw", "each step", found.losses),
        ("average", str(found.average), found.average.points),
        ("held", "validation", found.validation),
        ("ema", "validation of the averaged values (EMA)", found.validation_ema),
        ("broken", f"not finite: {len(found.broken)} step{'s' if len(found.broken) != 1 else ''}", found.broken),
    ]
    key = [mark("span", mark("i", class_=f"stroke {class_}"), said) for class_, said, there in parts if there]
    return mark("p", *key, class_="legend")


# -- as a picture ------------------------------------------------------------------------------------------------------
INK, QUIET, RULE, ACCENT, HELD, EMA, BAD = "#1d2428", "#5d676c", "#e2dfd9", "#17646b", "#b97a1f", "#8d5f8c", "#b3402a"


def draw_curve(history: History, file: str | os.PathLike[str], title: str) -> None:
    """Write the curve as a PNG of 1600 pixels' width, on white.

    Raises:
        FormatError: no step has a finite loss, so that there is nothing to draw, or the folder does not exist.
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra(f'{file}: the curve needs matplotlib ({error}): pip install "nerine[plots]"') from error
    found = _Curves.of(history)
    if found.is_empty:
        raise FormatError(f"{history.file}: expected steps with a finite loss to draw, found none")
    figure = Figure(figsize=(8.0, 5.0), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    _draw_losses(above, found)
    # a title is a text: $ would make it a formula
    above.set_title(printable(title, 90), loc="left", fontsize=12, fontweight="bold", color=INK, parse_math=False)
    below.plot(*_columns(found.rates), color=QUIET, linewidth=1.4)
    below.set_ylim(0, max((rate for _, rate in found.rates), default=0.0) * 1.1 or 1.0)
    below.set_ylabel("learning rate", color=QUIET)
    below.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    below.set_xlabel("step", color=QUIET)
    for axes in (above, below):
        axes.grid(color=RULE, linewidth=0.7)
        axes.tick_params(colors=QUIET, labelsize=9, length=0)
        axes.spines[:].set_visible(False)
        axes.set_axisbelow(True)
    with replacing(Path(file)) as out:
        figure.savefig(out, format="png", dpi=200)


def _draw_losses(axes: Any, found: _Curves) -> None:
    axes.plot(*_columns(found.losses), color=ACCENT, alpha=0.25, linewidth=0.8, label="each step")
    if found.average.points:
        axes.plot(*_columns(found.average.points), color=ACCENT, linewidth=2.2, label=str(found.average))
    if found.validation_ema:
        said = "validation of the averaged values (EMA)"
        axes.plot(*_columns(found.validation_ema), "s--", color=EMA, markersize=4, linewidth=1.1, label=said)
    if found.validation:
        axes.plot(*_columns(found.validation), "o-", color=HELD, markersize=5, linewidth=1.1, label="validation")
    if found.broken:
        top = [found.limits[1]] * len(found.broken)
        axes.plot(found.broken, top, "x", color=BAD, clip_on=False, label=f"not finite: {len(found.broken)}")
    axes.set_yscale("log" if found.is_log else "linear")
    axes.set_ylim(*found.limits)
    if found.is_log:
        ticks = Scale(*found.limits, 0, 1, True).ticks
        axes.minorticks_off()
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylabel("loss", color=QUIET)
    axes.legend(loc="upper right", fontsize=9, frameon=True, framealpha=0.85, edgecolor="none", labelcolor=INK)


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
