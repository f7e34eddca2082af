"""What the page shows, as markup: tables, figures at a glance, progress, errors. Texts of files and users are escaped
on the way in, by `nerine.tools.pages.marks`, whatever they are. Knows neither Gradio nor tools.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from nerine.errors import (
    DeviceError,
    FormatError,
    MergeError,
    MissingExtra,
    NerineError,
    OptionError,
    ShapeError,
    TargetError,
    UnsupportedBase,
)
from nerine.tools.pages.marks import Markup, joined, mark, words

__all__ = ["block", "error_panel", "facts", "grid", "hint", "linked", "notes", "progress_panel", "stacked", "verdict"]

MOST_ROWS = 400
LONGEST = 4000  # characters of an error
_TITLES: Sequence[tuple[type[Exception], str]] = (
    (OptionError, "This cannot be done as asked"),
    (FormatError, "This file cannot be used"),
    (TargetError, "No layer fits"),
    (ShapeError, "The shapes do not fit"),
    (MergeError, "This cannot be merged"),
    (UnsupportedBase, "This model cannot be adapted"),
    (DeviceError, "The device does not fit"),
    (MissingExtra, "Something is not installed"),
    (OSError, "The disk said no"),
)

_OPTIONS = re.compile(r"--[a-z][a-z-]+\b")
_FIELDS = {  # what errors of the tools call by its option, as the page calls it
    "--base": 'the field "Checkpoint" under "More settings"',
    "--rank": 'the field "Rank"',
    "--tol": 'the field "Tolerance"',
    "--force": 'a tick at "Replace"',
    "--dtype": 'the field "Numbers"',
    "--algo": "Algorithm",
    "--dialect": 'the field "Dialect"',
    "--out": "the folder",
}


def hint(text: str) -> Markup:
    """What stands in place of a result before there is one."""
    return mark("div", mark("p", text), class_="ne-hint")


def error_panel(error: Exception) -> Markup:
    """An error in one paragraph, never with a traceback."""
    title = next((title for kind, title in _TITLES if isinstance(error, kind)), "This went wrong inside nerine")
    if isinstance(error, OSError) and not isinstance(error, NerineError):
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror or error}; nothing was changed"
    elif isinstance(error, NerineError):
        text = _OPTIONS.sub(lambda match: _FIELDS.get(match[0], match[0]), str(error))
    else:
        text = f"{type(error).__name__}: {error}. Nothing was written; the page can be used further."
    return mark("div", mark("h3", title), mark("p", words(text, LONGEST)), class_="ne-error", role="alert")


def progress_panel(done: int, total: int, what: str, *, waits: bool = False, shown: str = "") -> Markup:
    """How far a job is."""
    share = 100 * done / total if total else 0.0
    known = {"aria_valuenow": f"{share:.0f}", "aria_valuemin": "0", "aria_valuemax": "100"} if total else {}
    fill = mark("i", style=f"width:{share:.1f}%") if total else mark("i", class_="ne-moving")
    track = mark("div", fill, class_="ne-track", role="progressbar", aria_label="progress", **known)
    if waits:
        said = words("Another job of this kind is running; this one is next.")
    else:
        said = words(f"{done:,} of {total:,}" if total else "Reading …")
    line = mark("p", mark("span", said), mark("span", words(what, 120), class_="ne-quiet"), class_="ne-step")
    return joined([mark("div", track, line, class_="ne-job"), Markup(shown)])


def verdict(text: str, good: bool = True, more: str = "") -> Markup:
    """The result in one line."""
    content = [mark("b", text), *([mark("span", words(more, 600))] if more else [])]
    return mark("p", *content, class_="ne-verdict " + ("ne-good" if good else "ne-bad"))


def facts(pairs: Iterable[tuple[str, object, str]]) -> Markup:
    """Figures at a glance: (label, value, a word beside it); those without a value are left out."""
    tiles = [
        mark(
            "div", mark("dt", label), mark("dd", words(value, 80), *([mark("small", words(more, 80))] if more else []))
        )
        for label, value, more in pairs
        if str(value)
    ]
    return mark("dl", *tiles, class_="ne-facts")


def grid(
    head: Sequence[str], rows: Sequence[Sequence[object]], title: str = "", *, numbers: Iterable[int] = ()
) -> Markup:
    """A table that scrolls by itself; `numbers` are columns whose cells stand on the right. Empty ones are left out."""
    if not rows:
        return Markup()
    right = set(numbers)
    kept = [at for at in range(len(head)) if any(str(row[at]) for row in rows)]
    names = [mark("th", head[at], scope="col", class_="n" if at in right else None) for at in kept]
    lines = [
        mark("tr", *(mark("td", words(row[at], 300), class_="n" if at in right else None) for at in kept))
        for row in rows[:MOST_ROWS]
    ]
    content = [mark("thead", mark("tr", *names)), mark("tbody", *lines)]
    table = mark(
        "div", mark("table", *content), class_="ne-scroll", tabindex="0", role="region", aria_label=title or "table"
    )
    more = [mark("p", f"and {len(rows) - MOST_ROWS:,} more", class_="ne-quiet")] if len(rows) > MOST_ROWS else []
    return mark("section", *([mark("h3", title)] if title else []), table, *more)


def notes(texts: Iterable[str]) -> Markup:
    """Remarks of a tool."""
    items = [mark("li", words(text, 600)) for text in texts]
    return mark("ul", *items, class_="ne-notes") if items else Markup()


def linked(address: str, text: str) -> Markup:
    """A link that saves what is behind it."""
    return mark("a", text, href=address, download=True, class_="ne-link")


def block(title: str, *content: Markup) -> Markup:
    """A heading and what is under it; nothing where there is nothing."""
    inside = joined(content)
    return mark("section", mark("h3", title), inside) if inside else Markup()


def stacked(*parts: Markup) -> Markup:
    """A result: its parts below each other."""
    return mark("div", *parts, class_="ne-result")
