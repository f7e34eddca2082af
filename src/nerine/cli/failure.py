"""How a command that failed ends: one paragraph on stderr that says what to do, where more is explained, and a code.

Knows every kind of error that can reach the door of the program, and prints; nothing here decides what is an error.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import typer

from nerine.cli.help import usage_of
from nerine.cli.terminal import paint, paragraph, say, width_of
from nerine.errors import NerineError
from nerine.troubles import Trouble, find

__all__ = ["BROKEN_PIPE", "FAULT", "INTERRUPTED", "REFUSED", "UsageError", "ended_early", "misused", "report"]

REFUSED = 1  # exit codes: the library refused
FAULT = 70  # an error inside of nerine, as sysexits.h has it
INTERRUPTED = 130  # by Ctrl-C
BROKEN_PIPE = 141  # as a program that SIGPIPE ended: nobody reads what is written

UsageError: Any = typer.BadParameter.__mro__[2]  # click's root of all that is shown with a usage line


def report(error: BaseException, with_traceback: bool) -> int:
    """Show an error of the library, of the system or of nerine itself; the exit code."""
    if with_traceback:
        traceback.print_exception(error)
        say("", err=True)
    if isinstance(error, NerineError):
        _say(str(error), find(error))
        return REFUSED
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        _say(f"{where}{error.strerror or error}; nothing was changed", find(str(error)))
        return REFUSED
    entry = find(error)
    if entry is not None and (entry.is_foreign or isinstance(error, ImportError)):
        _say(f"{type(error).__name__}: {error}", entry)
        return REFUSED
    _say(
        f"{type(error).__name__}: {error} ({_place(error)}). No message was written for this: this is a fault of "
        "nerine, not of your files, which are as they were. Run it again with --traceback to see where it happened, "
        "and report that together with what `nerine doctor` says",
        find("this is a fault of nerine"),
    )
    return FAULT


def misused(error: Any) -> int:
    """Show that a command was not understood; the exit code."""
    text = " ".join(error.format_message().split())
    param = getattr(error, "param", None)
    if param is not None and param.param_type_name == "argument":  # as the help calls it
        text = text.replace(f"'{param.name}'", param.name.upper())
    _say(text, None)
    context = getattr(error, "ctx", None)
    if context is not None:
        say(f"Usage: {usage_of(context)}", err=True)
        _more(f"{context.command_path} --help")
    return int(error.exit_code)


def ended_early() -> None:
    """Nobody reads stdout any more: let what is still to be written go nowhere, without a word."""
    with contextlib.suppress(OSError, ValueError):  # a stdout that is no file has nothing to let go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(text: str, entry: Trouble | None) -> None:
    """The paragraph, wrapped where it is read on a terminal: in a log it stays one line."""
    is_wrapped = sys.stderr.isatty() or os.environ.get("COLUMNS", "").isdigit()
    said = f"Error: {text}"
    lines = paragraph(said, width_of(sys.stderr)) if is_wrapped else said
    say(lines.replace("Error:", paint("Error:", "bold red", sys.stderr), 1), err=True)
    if entry is not None:
        _more(f"nerine explain {entry.key}")


def _more(command: str) -> None:
    say(f"More: {paint(command, 'cyan', sys.stderr)}", err=True)


def _place(error: BaseException) -> str:
    """The last place in nerine that the error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    root = Path(__file__).parent.parent
    for frame in reversed(frames):
        if Path(frame.filename).is_relative_to(root):
            return f"{Path(frame.filename).relative_to(root.parent).as_posix()}, line {frame.lineno}"
    return "outside of nerine"
