"""The command line: one file a command, each parses, calls the library and shows the report.

Nothing here is imported by the rest, and no command imports torch before it runs, so that help comes at once.
Exit codes: 0 done, 1 the library refused (one paragraph on stderr), 2 wrong usage, 3 what was checked is not as
promised, 70 an error inside of nerine, 130 interrupted, 141 nobody reads what is written.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import typer

from nerine.cli.bundle import bundle
from nerine.cli.combine import combine
from nerine.cli.compare import compare
from nerine.cli.convert import convert
from nerine.cli.demo import demo
from nerine.cli.doctor import doctor
from nerine.cli.explain import explain
from nerine.cli.extract import extract
from nerine.cli.failure import BROKEN_PIPE, INTERRUPTED, UsageError, ended_early, misused, report
from nerine.cli.generate import generate
from nerine.cli.help import Command, Group, columns, paint_heading
from nerine.cli.inspect import inspect
from nerine.cli.merge import merge
from nerine.cli.metadata import metadata
from nerine.cli.plan import plan
from nerine.cli.presets import presets
from nerine.cli.resize import resize
from nerine.cli.suggest import suggest
from nerine.cli.terminal import prepare_streams, say
from nerine.cli.train import train
from nerine.cli.ui import ui
from nerine.cli.verify import verify
from nerine.version import __version__

__all__ = ["app", "main"]

JOBS = (
    ("try it, in a minute or two", "nerine demo"),
    ("train on my pictures", "nerine train --data pictures --out run"),
    ("draw with what was trained", 'nerine generate "a cat" --adapter FILE -o cat.png'),
    ("look at a file", "nerine inspect FILE"),
    ("merge it into a model", "nerine merge MODEL FILE:0.8 -o MERGED"),
    ("convert it for a program", "nerine convert FILE -o NEW --dialect kohya"),
    ("take it out of a model", "nerine extract BASE TUNED -o FILE --rank 32"),
    ("do all this in the browser", "nerine ui"),
    ("see whether all is well", "nerine doctor"),
)


class Program(Group):
    """The program as a whole: alone it shows the jobs that people come for, with the commands to paste."""

    def alone(self, ctx: Any, width: int) -> Iterator[str]:
        yield f"nerine {__version__}: fine-tune models beyond LoRA; train = merge = export = reload"
        yield from self.members(ctx, width)
        yield from ("", "Options and examples of a command: nerine COMMAND --help")

    def members(self, ctx: Any, width: int) -> Iterator[str]:
        yield from ("", paint_heading("I want to"))
        yield from columns([(job, "", command) for job, command in JOBS], width, at=30)
        yield from super().members(ctx, width)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise typer.Exit(BROKEN_PIPE) from None


app = typer.Typer(name="nerine", cls=Program, pretty_exceptions_enable=False, rich_markup_mode=None)
PANELS: Mapping[str, tuple[Any, ...]] = {
    "Train and draw": (train, generate, plan, presets, demo),
    "Look at adapters": (inspect, compare, verify),
    "Change adapters": (convert, resize, combine, metadata, bundle),
    "Checkpoints and adapters": (merge, extract, suggest),
    "In the browser": (ui,),
    "When something is wrong": (doctor, explain),
}
for panel, commands in PANELS.items():
    for command in commands:
        if isinstance(command, typer.Typer):
            app.add_typer(command, rich_help_panel=panel)
        else:
            app.command(cls=Command, rich_help_panel=panel)(command)


def _version(asked: bool) -> None:
    if asked:
        say(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
    traceback: bool = typer.Option(
        False, "--traceback", help="Where a command fails, show the whole traceback; so does NERINE_TRACEBACK=1."
    ),
) -> None:
    """Fine-tune models beyond LoRA: train = merge = export = reload."""


def main() -> None:
    """The entry point `nerine`."""
    prepare_streams()
    words = sys.argv[1:]
    with_traceback = "--traceback" in words or os.environ.get("NERINE_TRACEBACK", "0") not in ("", "0")
    # typer reads sys.argv itself where nothing is taken out of it, and expands * on Windows then
    arguments = [word for word in words if word != "--traceback"] if "--traceback" in words else None
    try:
        code = app(arguments, prog_name="nerine", standalone_mode=False)
        sys.stdout.flush()
    except UsageError as error:
        code = misused(error)
    except typer.Abort:
        code = INTERRUPTED
    except BrokenPipeError:
        code = BROKEN_PIPE
    except Exception as error:
        code = report(error, with_traceback)
    if code == BROKEN_PIPE:
        ended_early()
    sys.exit(code if isinstance(code, int) else 0)
