"""The pictures of the page, drawn by matplotlib's objects (no pyplot, nothing global) as SVG within the page.

Ink is a grey that can be read on light and on dark ground, and the ground is left transparent. No text of a file is
ever read as markup of matplotlib.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nerine.tools.compare import CompareReport
from nerine.tools.inspect import InspectReport
from nerine.tools.pages.marks import Markup, mark

__all__ = ["amounts_plot", "distances_plot", "embedded", "layers_plot", "loss_plot", "strip"]

INK, GRID, MAIN, BAD, SOFT = "#6b7280", "#9ca3af", "#4f7cac", "#d1495b", "#9db4c8"
MOST_BARS = 24
_SMOOTH = 0.9  # share of the past in the shown loss


def layers_plot(report: InspectReport) -> Markup:
    """The change of every layer, in the order of the model, suspicious ones marked."""
    rows = [row for row in report.rows if row.size]
    if len(rows) < 2:
        return Markup()
    bad = {finding.layer for finding in report.findings}
    relative = any(row.relative is not None for row in rows)
    figure, axes = _axes(7.6, 2.7)
    for chosen, colour, label in ((False, MAIN, "layers"), (True, BAD, "suspicious")):
        at = [i for i, row in enumerate(rows) if (row.layer in bad) == chosen]
        if at:
            axes.plot(at, [rows[i].size for i in at], "o", color=colour, markersize=4, label=label, alpha=0.85)
    _scale(axes, [row.size or 0.0 for row in rows])
    axes.set_xlabel("layers in the order of the model")
    axes.set_ylabel("change / weight" if relative else "norm of the change")
    if bad & {row.layer for row in rows}:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    return _picture(figure, f"Size of the change in {len(rows)} layers")


def distances_plot(report: CompareReport) -> Markup:
    """How far apart every layer is, in the order of the model."""
    found = [row.distance for row in report.rows if row.distance is not None]
    if not found:
        return Markup()
    figure, axes = _axes(7.6, 2.5)
    axes.bar(range(len(found)), found, color=MAIN, width=0.8)
    axes.set_ylim(0, max(*found, 1e-9, 0.0) * 1.1)
    axes.set_xlim(-0.7, len(found) - 0.3)
    axes.set_xlabel("layers in the order of the model")
    axes.set_ylabel("distance")
    return _picture(figure, f"Distance of {len(found)} layers, from {min(found):.3g} to {max(found):.3g}")


def amounts_plot(pairs: Sequence[tuple[str, float]], label: str) -> Markup:
    """Amounts by name, as bars from the left, in the given order."""
    shown = [(name, amount) for name, amount in pairs if amount > 0][:MOST_BARS]
    if not shown:
        return Markup()
    figure, axes = _axes(7.6, 0.7 + 0.24 * len(shown))
    axes.barh(range(len(shown)), [amount for _, amount in shown], color=MAIN, height=0.68)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    for tick in axes.get_yticklabels():
        tick.set_parse_math(False)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return _picture(figure, f"{label} of {len(shown)} blocks")


def loss_plot(losses: Sequence[float], total: int) -> Markup:
    """The loss of every step so far, and its running mean, on an axis as long as the training will be."""
    figure, axes = _axes(7.6, 2.3)
    if losses:
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, color=SOFT, linewidth=0.9, label="step")
        axes.plot(steps, _smoothed(losses), color=MAIN, linewidth=1.8, label="mean")
        axes.legend(frameon=False, labelcolor=INK, fontsize=8, ncols=2)
    axes.set_xlim(0, total)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    last = f", now {losses[-1]:.3f}" if losses else ""
    return _picture(figure, f"Loss over {len(losses)} of {total} steps{last}")


def strip(pictures: Any, zoom: int = 3) -> Markup:
    """Pictures `[n, 3, h, w]` in [-1, 1] side by side, as one."""
    from PIL import Image

    from nerine.tiny.data import to_image

    tiles = [to_image(picture) for picture in pictures]
    gap = 1
    side, tall = tiles[0].size
    sheet = Image.new("RGBA", (len(tiles) * (side + gap) - gap, tall), (0, 0, 0, 0))
    for at, tile in enumerate(tiles):
        sheet.paste(tile, (at * (side + gap), 0))
    out = io.BytesIO()
    sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST).save(out, "PNG")
    return _image("image/png", out.getvalue(), f"{len(tiles)} pictures", "ne-strip")


def embedded(file: Path, label: str) -> Markup:
    """A PNG file within the page."""
    return _image("image/png", file.read_bytes(), label, "ne-sheet")


# -- parts -------------------------------------------------------------------------------------------------------------
def _axes(wide: float, tall: float) -> tuple[Any, Any]:
    figure = Figure(figsize=(wide, tall), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(which="both", colors=INK, labelsize=8, length=0)
    axes.grid(color=GRID, alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=9)
    return figure, axes


def _scale(axes: Any, values: Sequence[float]) -> None:
    """Logarithmic where values are far apart."""
    if max(values) > 12 * min(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, max(values) * 1.12)


def _smoothed(losses: Sequence[float]) -> list[float]:
    found = [losses[0]]
    for loss in losses[1:]:
        found.append(_SMOOTH * found[-1] + (1 - _SMOOTH) * loss)
    return found


def _picture(figure: Any, label: str) -> Markup:
    out = io.BytesIO()
    figure.savefig(out, format="svg", transparent=True)
    return _image("image/svg+xml", out.getvalue(), label, "ne-plot")


def _image(kind: str, data: bytes, label: str, style: str) -> Markup:
    """A picture within the page. Its address is longer than `mark` lets attributes be, and is made of base64 alone."""
    source = f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
    plain = str(mark("img", alt=label, class_=style))
    return Markup(plain.replace("<img ", f'<img src="{source}" ', 1).replace("></img>", ">"))
