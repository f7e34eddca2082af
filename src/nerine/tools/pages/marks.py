"""HTML and SVG as text. Whatever comes from a file goes through `words`, and every attribute through `mark`, so that no
name, tag or title can become markup.
"""

from __future__ import annotations

import html
from collections.abc import Iterable

from nerine.tools.inspect.text import printable

__all__ = ["Markup", "joined", "mark", "words"]


class Markup(str):
    """Text that is markup already. Only `mark`, `words` and `joined` make it."""

    __slots__ = ()


def words(text: object, longest: int = 300) -> Markup:
    """A text as it is to be read, never as markup."""
    return Markup(html.escape(printable(text, longest)))


def joined(parts: Iterable[Markup], between: str = "") -> Markup:
    """Pieces of markup one after the other."""
    return Markup(between.join(parts))


def mark(name: str, /, *content: Markup | str, **attributes: str | float | bool | None) -> Markup:
    """An element. Content that is plain text is escaped; `class_` is class, and `aria_label` is aria-label; attributes
    that are None or False are left out."""
    told = "".join(
        _attribute(key, value) for key, value in attributes.items() if value is not None and value is not False
    )
    inside = "".join(part if isinstance(part, Markup) else words(part) for part in content)
    if name in _EMPTY and not inside:
        return Markup(f"<{name}{told}>")
    return Markup(f"<{name}{told}>{inside}</{name}>")


_EMPTY = frozenset({"input", "meta", "br"})


def _attribute(key: str, value: str | float | bool) -> str:
    name = key.rstrip("_").replace("_", "-") if key != "viewBox" else key
    if value is True:
        return f" {name}"
    text = f"{value:.6g}" if isinstance(value, float) else printable(value, 100_000)
    return f' {name}="{html.escape(text)}"'
