"""The picture of an algorithm: its formula with every tensor as a box of about its shape, as SVG.

What is trained has a colour, what stays is grey; axes and sizes stand below. Colours are CSS variables, so that a page
sets them for light and dark; a file by itself follows the system. Knows layouts and nothing of what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from entries import Entry
from facts import Place, places

from nerine.algorithms import Design

__all__ = ["Box", "draw", "formula_in_words"]

HEIGHT, MARGIN, GAP = 128, 16, 9
FULL = 640  # channels that fill the height
SIGN, NAME, AXES = 22, 15, 12  # sizes of letters
STYLE = """<style>
.structure { --ink: #23262d; --faint: #5d6472; --trained: #c23a7b; --frozen: #b9bec9; }
@media (prefers-color-scheme: dark) {
.structure { --ink: #e3e5ea; --faint: #a4a9b6; --trained: #e56ba3; --frozen: #565c6b; }
}
.structure text { fill: var(--ink); font-family: system-ui, sans-serif; }
.structure .axes, .structure .legend { fill: var(--faint); }
.structure .trained { fill: var(--trained); }
.structure .frozen { fill: var(--frozen); }
.structure .frame { fill: none; stroke: var(--faint); }
.structure .line { fill: none; stroke: var(--trained); stroke-width: 4; }
.structure .line.still { stroke: var(--frozen); }
</style>"""


class Box(NamedTuple):
    """Something of a formula: its size, what is drawn (from the upper left corner), and two lines below."""

    width: float
    height: float
    body: str
    name: str = ""
    axes: str = ""

    @property
    def room(self) -> float:
        """The width it takes with what is written below."""
        return max(self.width, 0.57 * NAME * len(self.name), 0.53 * AXES * len(self.axes))


def _length(channels: int) -> float:
    """Channels as a length in the picture: small ones stay visible."""
    return max(12.0, round(HEIGHT * float((channels / FULL) ** 0.5), 1))


def _rect(x: float, y: float, w: float, h: float, kind: str, more: str = ' rx="2"') -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}"{more}/>'


def _matrix(rows: int, columns: int, kind: str) -> tuple[float, float, str]:
    w, h = _length(columns), _length(rows)
    return w, h, _rect(0, 0, w, h, kind)


def _shaded(rows: int, columns: int, shades: Sequence[float], along: int) -> tuple[float, float, str]:
    """A trained matrix in strips along its rows (0) or columns (1), each as strong as its shade."""
    w, h = 1.4 * _length(columns) if along else _length(columns), _length(rows) if along else 1.4 * _length(rows)
    one, body = (w if along else h) / len(shades), ""
    for i, shade in enumerate(shades):
        x, y = (round(i * one, 1), 0.0) if along else (0.0, round(i * one, 1))
        strip = (round(one - 1, 1), h) if along else (w, round(one - 1, 1))
        body += _rect(x, y, *strip, "trained", f' opacity="{shade:g}"')
    return w, h, body


def _column(rows: int, kind: str) -> tuple[float, float, str]:
    return 12, _length(rows), _rect(0, 0, 12, _length(rows), kind)


def _diagonal(count: int, kind: str) -> tuple[float, float, str]:
    side = _length(count)
    still = " still" if kind == "frozen" else ""
    line = f'<path class="line{still}" d="M2 2L{side - 2:g} {side - 2:g}"/>'
    return side, side, _rect(0, 0, side, side, "frame") + line


def _blocks(channels: int, count: int, kind: str, upper: bool = False) -> tuple[float, float, str]:
    """Blocks along a diagonal (at most eight are drawn); with `upper` only what is above the diagonal of each."""
    side, shown = _length(channels), min(count, 8)
    step = side / shown
    body = _rect(0, 0, side, side, "frame")
    for i in range(shown):
        a, b = round(i * step, 1), round((i + 1) * step, 1)
        triangle = f'<path class="{kind}" d="M{a:g} {a:g}L{b:g} {a:g}L{b:g} {b:g}Z"/>'
        body += triangle if upper else _rect(a, a, b - a, b - a, kind)
    return side, side, body


def _butterfly(channels: int, stages: int, kind: str) -> tuple[float, float, str]:
    """The stages of a butterfly side by side, the last one first (three at most): who meets whom, of eight."""
    side, shown, cell = _length(channels), min(stages, 3), _length(channels) / 8
    body = ""
    for place, stage in enumerate(reversed(range(shown))):
        left = place * (side + GAP)
        body += _rect(left, 0, side, side, "frame")
        for i in range(8):
            for j in (i, i ^ (1 << stage)):
                body += _rect(round(left + j * cell, 1), round(i * cell, 1), round(cell, 1), round(cell, 1), kind, "")
    return shown * side + (shown - 1) * GAP, side, body


FORMS: Mapping[str, Callable[[Mapping[str, int], str], tuple[float, float, str]]] = {
    "n s s": lambda s, kind: _blocks(s["n"] * s["s"], s["n"], kind),
    "n half": lambda s, kind: _blocks(s["n"] * s["s"], s["n"], kind, upper=True),
    "m n s s": lambda s, kind: _butterfly(s["n"] * s["s"], s["m"], kind),
    "1 rank": lambda s, kind: _diagonal(s["rank"], kind),
}


def _words(axes: str) -> list[str]:
    """The axes that a linear layer has."""
    return [word for word in axes.split() if word[0] not in "*?"]


def _tensor(name: str, entry: Entry, design: Design) -> Box:
    """A tensor of the layout as a box."""
    label = entry.labels.get(name, name)
    spec, sizes = design.layout.specs[name], {**design.sizes, "1": 1}
    words, kind = _words(spec.axes), "trained" if spec.trained else "frozen"
    form = FORMS.get(" ".join(words))
    if form is not None:
        drawn = form(sizes, kind)
    elif [word for word in words if word != "1"] == words[:1]:
        drawn = _column(sizes[words[0]], kind)
    else:
        rows, columns = (sizes[word] for word in words[-2:])
        along = words.index("rank") if entry.shades else 0
        drawn = _shaded(rows, columns, entry.shades, along) if entry.shades else _matrix(rows, columns, kind)
    return Box(*drawn, label, " × ".join(str(sizes[word]) for word in words))


def _base(name: str, place: Place) -> Box:
    """Something of the layer's own."""
    rows = place.site.shape[0]
    if name == "W":
        columns = place.site.shape[1]
        return Box(*_matrix(rows, columns, "frozen"), "W", f"{rows} × {columns}")
    return Box(*_column(rows, "frozen"), name, str(rows))


def _sign(text: str) -> Box:
    width = round(0.62 * SIGN * len(text.strip(" ,")) + (4 if len(text) > 1 else 0), 1)
    middle = f'<text x="{width / 2:g}" y="{SIGN * 0.34:g}" font-size="{SIGN}" text-anchor="middle">{text}</text>'
    return Box(width, 0, middle)


def boxes(entry: Entry) -> list[Box]:
    """The formula of an algorithm, sign by sign, on the first of its layers.

    Raises:
        ValueError: the picture leaves out a tensor that is trained.
    """
    place = places(entry.algorithm)[0]
    design = entry.algorithm.design(place.site)
    left_out = {name for name, spec in design.layout.specs.items() if spec.trained} - set(entry.picture)
    if left_out:
        raise ValueError(f"algorithms.toml: {entry.name}: the picture leaves out {sorted(left_out)}")
    found = []
    for word in entry.picture:
        if word in design.layout.specs:
            found.append(_tensor(word, entry, design))
        else:
            found.append(_base(word, place) if word in ("W", "w", "b") else _sign(word))
    return found


def formula_in_words(entry: Entry) -> str:
    """What the picture shows, for who does not see it."""
    return " ".join(entry.labels.get(word, word) for word in entry.picture)


def draw(entry: Entry) -> str:
    """The picture as an SVG file."""
    parts, x = [], float(MARGIN)
    shown = boxes(entry)
    tallest = max(box.height for box in shown)
    axis = MARGIN + tallest / 2
    for box in shown:
        left, top = x + (box.room - box.width) / 2, axis - box.height / 2
        parts.append(f'<g transform="translate({left:.1f} {top:.1f})">{box.body}</g>')
        middle, below = x + box.room / 2, MARGIN + tallest + 20
        for size, text, kind, y in ((NAME, box.name, "name", below), (AXES, box.axes, "axes", below + 17)):
            if text:
                at = f'x="{middle:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="middle"'
                parts.append(f'<text class="{kind}" {at}>{text}</text>')
        x += box.room + GAP
    width, height = max(x - GAP + MARGIN, 190), MARGIN + tallest + 70
    parts.append(_legend(height - 16))
    sizes = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" class="structure" {sizes}>\n{STYLE}\n{body}\n</svg>\n'


def _legend(y: float) -> str:
    """What the two colours mean."""
    words = ((MARGIN, "trained", "trained"), (MARGIN + 78, "frozen", "stays as it is"))
    return "".join(
        _rect(x, y - 9, 10, 10, kind) + f'<text class="legend" x="{x + 15}" y="{y:g}" font-size="{AXES}">{text}</text>'
        for x, kind, text in words
    )
