"""The error against the size, one line an algorithm: as SVG, or through matplotlib as a picture."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from nerine.errors import MissingExtra, OptionError
from nerine.files.atomic import replacing, write_text
from nerine.tools.pages.marks import Markup, mark, words
from nerine.tools.pages.scales import Scale, linear
from nerine.tools.suggest.report import Curve, SuggestReport

__all__ = ["svg", "write_plot"]

WIDE, TALL, LEFT, RIGHT, TOP, BOTTOM = 720.0, 420.0, 58.0, 150.0, 40.0, 50.0
STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1d2428; --quiet: #5d676c; --rule: #e2dfd9;
  --l0: #1d2428; --l1: #17646b; --l2: #b97a1f; --l3: #5468a8; --l4: #8d5f8c; --l5: #b3402a; --l6: #8a9094; }
@media (prefers-color-scheme: dark) { :root { --paper: #1a2125; --ink: #e4e8e8; --quiet: #98a4a8; --rule: #2e383d;
  --l0: #f2f4f4; --l1: #58b3b7; --l2: #dba252; --l3: #8fa3e6; --l4: #c495c3; --l5: #f08a70; --l6: #8a979c; } }
text { font: 13px system-ui, sans-serif; fill: var(--quiet); } .title { font-weight: 600; fill: var(--ink); }
.paper { fill: var(--paper); } .grid { stroke: var(--rule); } .line { fill: none; stroke-width: 2; }
.dashed { stroke-dasharray: 5 4; } .broad { stroke-width: 5; stroke-opacity: .25; }
""" + "".join(f".l{i} {{ stroke: var(--l{i}); }} text.l{i} {{ stroke: none; fill: var(--l{i}); }} " for i in range(7))


def svg(report: SuggestReport) -> str:
    """The picture, in light or dark as the viewer is; an error of one is as good as no adapter."""
    x = Scale(min(report.sizes), max(report.sizes), LEFT, WIDE - RIGHT, True)
    top = max([error for curve in report.curves for error in curve.errors if error is not None], default=1.0)
    y = linear(0.0, top * 1.05, TALL - BOTTOM, TOP)
    drawn = [
        mark("rect", width=WIDE, height=TALL, class_="paper"),
        mark("text", f"Relative error of the change, {report.other}"[:90], x=LEFT, y=22, class_="title"),
    ]
    for tick in y.ticks:
        drawn.append(mark("line", x1=LEFT, x2=WIDE - RIGHT, y1=y(tick), y2=y(tick), class_="grid"))
        drawn.append(mark("text", f"{tick:g}", x=LEFT - 8, y=y(tick) + 4, text_anchor="end"))
    free = LEFT - 20
    for size in report.sizes:
        text = f"{size / 10**6:g}"
        if x(size) - 4 * len(text) > free:  # not over the one before
            drawn.append(mark("text", text, x=x(size), y=TALL - BOTTOM + 20, text_anchor="middle"))
            free = x(size) + 4 * len(text)
    drawn.append(mark("text", "size in MB", x=(LEFT + WIDE - RIGHT) / 2, y=TALL - 10, text_anchor="middle"))
    drawn += _lines(report, x, y)
    box = {"viewBox": f"0 0 {WIDE:.0f} {TALL:.0f}", "role": "img", "aria_label": "Relative error against size"}
    return mark("svg", Markup(f"<style>{STYLE}</style>"), *drawn, xmlns="http://www.w3.org/2000/svg", **box) + "\n"


def _lines(report: SuggestReport, x: Scale, y: Scale) -> list[Markup]:
    drawn = []
    places = _apart([y(_last(curve)) for curve in report.curves])
    for i, (curve, place) in enumerate(zip(report.curves, places, strict=True)):
        points = [
            (x(size), y(error)) for size, error in zip(report.sizes, curve.errors, strict=True) if error is not None
        ]
        if not points:
            continue
        way = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        dashed = " dashed" if curve.at else ""
        said = mark("title", words(curve.name))
        broad = " broad" if curve.name == "auto" else ""
        drawn.append(mark("polyline", said, points=way, class_=f"line l{i % 7}{dashed}{broad}"))
        drawn.append(mark("text", curve.name, x=WIDE - RIGHT + 10, y=place + 4, class_=f"l{i % 7}"))
    return drawn


def _last(curve: Curve) -> float:
    return next((error for error in reversed(curve.errors) if error is not None), 1.0)


def _apart(places: Sequence[float], least: float = 15.0) -> list[float]:
    """Places of labels, moved up where they would lie on each other, and down where that is above the picture."""
    found = list(places)
    order = sorted(range(len(places)), key=lambda i: (-places[i], -i))
    for below, above in itertools.pairwise(order):
        found[above] = min(found[above], found[below] - least)
    down = max(0.0, TOP - min(found, default=TOP))
    return [place + down for place in found]


def write_plot(report: SuggestReport, file: str | os.PathLike[str]) -> None:
    """Write the picture: .svg, or .png, .pdf and .jpg through matplotlib.

    Raises:
        OptionError: another kind of file.
        MissingExtra: matplotlib is needed and not installed.
    """
    place = Path(file)
    if place.suffix == ".svg":
        write_text(place, svg(report))
    elif place.suffix in (".png", ".pdf", ".jpg"):
        _draw(report, place)
    else:
        raise OptionError(f"{place}: expected a picture called .svg, .png, .pdf or .jpg")


def _draw(report: SuggestReport, place: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra(
            f'{place.suffix} pictures need matplotlib ({error}): pip install "nerine[plots]", or write .svg'
        ) from error
    figure = Figure(figsize=(7.2, 4.2), layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for curve in report.curves:
        known = [(s / 10**6, e) for s, e in zip(report.sizes, curve.errors, strict=True) if e is not None]
        if known:
            axes.plot(*zip(*known, strict=True), label=curve.name, linestyle="--" if curve.at else "-")
    axes.set(xscale="log", xlabel="size in MB", ylabel="relative error", title=f"{report.other}", ylim=(0, None))
    axes.legend()
    with replacing(place) as out:
        figure.savefig(out, format=place.suffix[1:], dpi=150)
