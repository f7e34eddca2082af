"""`nerine metadata`: what the header of an adapter file says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from nerine.cli.help import Command, Group
from nerine.cli.shared import DRY_RUN, FORCE, JSON, PICKLE, pairs, show
from nerine.cli.terminal import say
from nerine.errors import OptionError

if TYPE_CHECKING:
    from nerine.tools.metadata import MetadataReport

__all__ = ["metadata"]

_ABOUT = """Show, change or strip what an adapter file says of itself.

The tensors stay as they are, bit by bit.

Examples:
    nerine metadata show style.safetensors
    nerine metadata edit style.safetensors --set modelspec.author=Ann -o new.safetensors
    nerine metadata strip style.safetensors -o public.safetensors
"""
metadata = typer.Typer(
    name="metadata",
    cls=Group,
    rich_markup_mode=None,
    help=_ABOUT,
)
FILE: Path = typer.Argument(..., help="An adapter file, or the folder of one.", show_default=False)
WHERE: Path | None = typer.Option(None, "--out", "-o", help="Where to write.", show_default=False)
IN_PLACE: bool = typer.Option(False, "--in-place", help="Write over FILE itself.")


@metadata.command("show", cls=Command)
def show_(file: Path = FILE, allow_pickle: bool = PICKLE, as_json: bool = JSON) -> None:
    """Show all entries.

    Examples:
        nerine metadata show style.safetensors
        nerine metadata show style.safetensors --json
    """
    from nerine.tools.metadata import show_metadata

    show(show_metadata(file, allow_pickle=allow_pickle), as_json)


@metadata.command(cls=Command)
def edit(
    file: Path = FILE,
    set_: list[str] = typer.Option([], "--set", help="KEY=VALUE, as often as you like."),
    delete: list[str] = typer.Option([], "--delete", help="KEY, where * stands for anything; as often as you like."),
    out: Path | None = WHERE,
    in_place: bool = IN_PLACE,
    force: bool = FORCE,
    dry_run: bool = DRY_RUN,
    as_json: bool = JSON,
) -> None:
    """Set and delete entries.

    The hashes by which other programs know a file are worked out anew.

    Examples:
        nerine metadata edit style.safetensors --set modelspec.author=Ann -o new.safetensors
        nerine metadata edit style.safetensors --delete 'ss_*' --in-place
    """
    from nerine.tools.metadata import edit_metadata

    if not set_ and not delete:
        raise OptionError("nothing to do: give --set KEY=VALUE or --delete KEY")
    target = _target(out, in_place)
    report = edit_metadata(file, target, set=pairs(set_, "--set"), delete=delete, force=force, dry_run=dry_run)
    _show(report, dry_run, as_json)


@metadata.command(cls=Command)
def strip(
    file: Path = FILE,
    everything: bool = typer.Option(False, "--all", help="All but what tells how the tensors are to be read."),
    out: Path | None = WHERE,
    in_place: bool = IN_PLACE,
    force: bool = FORCE,
    dry_run: bool = DRY_RUN,
    as_json: bool = JSON,
) -> None:
    """Remove what a file tells of its training.

    That is folders, captions, settings and prompts.

    What programs need to read it stays, and so do title, author and license (modelspec entries).

    Examples:
        nerine metadata strip style.safetensors -o public.safetensors
        nerine metadata strip style.safetensors --all --in-place
    """
    from nerine.tools.metadata import strip_metadata

    target = _target(out, in_place)
    report = strip_metadata(file, target, everything=everything, force=force, dry_run=dry_run)
    _show(report, dry_run, as_json)


def _target(out: Path | None, in_place: bool) -> Path | None:
    """Where to write; None is the file itself."""
    if in_place == (out is not None):
        raise OptionError("say where to write: either --out FILE or --in-place")
    return out


def _show(report: MetadataReport, dry_run: bool, as_json: bool) -> None:
    show(report, as_json)
    if dry_run and not as_json:
        say("nothing was written (--dry-run)")
