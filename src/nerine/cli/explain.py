"""`nerine explain`: what a message means and what to do, from the entries that every error points to."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import typer

from nerine.cli.choices import topics
from nerine.cli.shared import JSON
from nerine.cli.terminal import say
from nerine.errors import OptionError, nearest

if TYPE_CHECKING:
    from nerine.troubles import Trouble

__all__ = ["explain"]


def explain(
    words: list[str] | None = typer.Argument(
        None,
        metavar="[WHAT]",
        help='A name from the last line of an error, its text in quotation marks, or words; "-" reads stdin.',
        autocompletion=topics,
        show_default=False,
    ),
    as_json: bool = JSON,
) -> None:
    """Explain an error: what it means and what to do, in steps.

    Takes the name that stands in the last line of an error, or the text of any error as it was printed, a whole
    traceback included. Without anything it lists all that it knows.

    Examples:
        nerine explain
        nerine explain wrong-model
        nerine explain "CUDA out of memory. Tried to allocate 2.00 GiB"
        nerine explain - < log.txt
    """
    from nerine.troubles import troubles

    found = list(troubles().values()) if not words else _meant(sys.stdin.read() if words == ["-"] else " ".join(words))
    if as_json:
        say(json.dumps([entry.to_dict() for entry in found], indent=2))
    elif len(found) == 1:
        say("\n".join(_whole(found[0])))
    else:
        say("\n".join(_list(found)))


def _meant(text: str) -> list[Trouble]:
    """The entries for a name, the text of an error, or words.

    Raises:
        OptionError: there is none.
    """
    from nerine.troubles import find, search, troubles

    known = troubles()
    asked = text.strip()
    if asked in known:
        return [known[asked]]
    of_kind = [entry for entry in known.values() if asked and entry.fallback == asked]
    entry = find(text) if len(asked.split()) > 1 else None
    found = of_kind or ([entry] if entry is not None else search(asked))
    if not found:
        hint = nearest(asked, known) if len(asked.split()) == 1 else "`nerine explain` lists all that is explained."
        raise OptionError(f"nothing is known of {asked[:80]!r}. {hint}")
    return found


def _whole(entry: Trouble) -> list[str]:
    """An entry for the terminal: what it means, and the steps."""
    from nerine.cli.terminal import paint, paragraph, width_of

    width = min(100, width_of(sys.stdout))
    lines = [paint(entry.title, "bold", sys.stdout), "", *paragraph(entry.means, width).splitlines()]
    for number, step in enumerate(entry.steps, 1):
        lines += ["", *_step(number, step, width)]
    if entry.page:
        lines += ["", f"Read more: docs/{entry.page}"]
    return lines


def _step(number: int, step: str, width: int) -> list[str]:
    """A step; the command that it ends with stands on a line of its own, to be copied."""
    from nerine.cli.help import command_lines
    from nerine.cli.terminal import paint, paragraph

    before, quote, command = step.rstrip("`.").rpartition(": `")
    if not quote or "`" in command or not command:
        return [f"{number}. {paragraph(step, width, '   ').lstrip()}"]
    return [
        f"{number}. {paragraph(before, width - 1, '   ').lstrip()}:",
        *(paint(line, "cyan", sys.stdout) for line in command_lines(command, width, "     ")),
    ]


def _list(entries: list[Trouble]) -> list[str]:
    from nerine.cli.help import columns
    from nerine.cli.terminal import width_of

    rows = [(entry.key, "cyan", entry.title) for entry in entries]
    return [*columns(rows, min(100, width_of(sys.stdout))), "", "The whole of one: nerine explain NAME"]
