"""What the terminal can show: how wide it is, whether it has colours and lines that move, and which letters.

Everything that the commands print asks here, so that NO_COLOR, FORCE_COLOR, TERM=dumb, COLUMNS, a pipe and an encoding
without Unicode are respected in one place. Nothing here imports rich or torch unless a table or a bar is drawn.
"""

from __future__ import annotations

import codecs
import os
import shutil
import sys
import textwrap
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "NARROW",
    "console",
    "fitted",
    "has_colours",
    "is_live",
    "paint",
    "paragraph",
    "prepare_streams",
    "say",
    "width_of",
]

NARROW = 20  # columns: no text is wrapped to less
_USUAL = 80
_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
_LETTERS = {
    "×": "x",
    "·": "*",
    "•": "*",
    "±": "+-",
    "→": "->",
    "←": "<-",
    "≤": "<=",
    "≥": ">=",
    "≠": "!=",
    "≈": "~",
    "–": "-",
    "—": "-",
    "…": "...",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "²": "^2",
    "³": "^3",
    "√": "sqrt ",
    "α": "alpha",
    "β": "beta",
    "Δ": "D",
    "δ": "d",
    "Σ": "sum ",
    "σ": "sigma",
    "µ": "u",
    "μ": "u",
    "∞": "inf",
    "─": "-",
    "━": "-",
    "│": "|",
    "┃": "|",
    "█": "#",
    "▇": "#",
    "▆": "#",
    "▅": "+",
    "▄": "+",
    "▃": "-",
    "▂": ".",
    "▁": ".",
    "░": ".",
    "▒": ":",
    "▓": "#",
    "✓": "ok",
    "✗": "x",
    "\N{NO-BREAK SPACE}": " ",
}


def has_colours(stream: IO[Any]) -> bool:
    """Whether colours may be written to it: NO_COLOR forbids, FORCE_COLOR asks for them, else a terminal decides."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") not in ("", "0"):
        return True
    return is_live(stream)


def is_live(stream: IO[Any]) -> bool:
    """Whether lines may move there: a terminal that can do more than append. No variable turns a pipe into one."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def width_of(stream: IO[Any]) -> int:
    """Columns: what COLUMNS says, else what the terminal has, else 80."""
    told = os.environ.get("COLUMNS", "")
    if told.isdigit() and int(told):
        return int(told)
    return shutil.get_terminal_size((_USUAL, 24)).columns if stream.isatty() else _USUAL


def paint(text: str, style: str, stream: IO[Any]) -> str:
    """The text in a style ("bold", "cyan", "bold red", ...), where the stream has colours."""
    if not text or not has_colours(stream):
        return text
    return f"\x1b[{';'.join(_STYLES[word] for word in style.split())}m{text}\x1b[0m"


def paragraph(text: str, width: int, indent: str = "") -> str:
    """A text wrapped to a width. Paths, commands and other long words stay in one piece."""
    return textwrap.fill(
        " ".join(text.split()),
        max(NARROW, width),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def say(text: str, *, err: bool = False, end: str = "\n") -> None:
    """Write a text to stdout, or to stderr, at once."""
    stream = sys.stderr if err else sys.stdout
    stream.write(f"{text}{end}")
    stream.flush()


def fitted(text: str, stream: IO[Any]) -> str:
    """The text in letters that the stream's encoding has, for whoever writes past the stream."""
    codecs.register_error("nerine", _in_ascii)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "nerine").decode(encoding)


def console(stderr: bool = False) -> Console:
    """rich's console, with what is decided here."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr,
        highlight=False,
        width=width_of(stream),
        no_color=bool(os.environ.get("NO_COLOR")),
        force_terminal=has_colours(stream) or is_live(stream),
        force_interactive=is_live(stream),
    )


def prepare_streams() -> None:
    """Let stdout and stderr take every letter: what their encoding lacks is written in ASCII instead of an error."""
    codecs.register_error("nerine", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="nerine")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_LETTERS.get(one) or one.encode("ascii", "backslashreplace").decode() for one in missing), error.end
