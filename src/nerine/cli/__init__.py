"""The command line: one file a command, each parses, calls the library and shows the report.

Nothing here is imported by the rest, and no command imports torch before it runs, so that help comes at once.
Exit codes: 0 done, 1 the library refused (one paragraph on stderr), 2 wrong usage, 3 what was checked is not as
promised, 130 interrupted.
"""

from __future__ import annotations

import sys

import typer

from nerine.cli.bundle import bundle
from nerine.cli.combine import combine
from nerine.cli.compare import compare
from nerine.cli.convert import convert
from nerine.cli.demo import demo
from nerine.cli.extract import extract
from nerine.cli.generate import generate
from nerine.cli.inspect import inspect
from nerine.cli.merge import merge
from nerine.cli.metadata import metadata
from nerine.cli.plan import plan
from nerine.cli.presets import presets
from nerine.cli.resize import resize
from nerine.cli.suggest import suggest
from nerine.cli.train import train
from nerine.cli.verify import verify
from nerine.errors import NerineError
from nerine.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="nerine",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
PANELS = {
    "Train and draw": (train, generate),
    "Look at adapters": (inspect, compare, verify),
    "Change adapters": (convert, resize, combine, metadata, bundle),
    "Checkpoints and adapters": (merge, extract, suggest),
    "Before training": (demo, plan, presets),
}
for panel, commands in PANELS.items():
    for command in commands:
        if isinstance(command, typer.Typer):
            app.add_typer(command, rich_help_panel=panel)
        else:
            app.command(rich_help_panel=panel)(command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """Fine-tune models beyond LoRA: train = merge = export = reload."""


def main() -> None:
    """The entry point `nerine`."""
    try:
        app()
    except NerineError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        typer.echo(f"{where}{error.strerror or error}; nothing was changed", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
