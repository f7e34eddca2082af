"""`nerine bundle`: textual inversions that travel in an adapter file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from nerine.cli.help import Command, Group
from nerine.cli.shared import DRY_RUN, FORCE, JSON, OUT, PICKLE, pairs, show
from nerine.cli.terminal import say

if TYPE_CHECKING:
    from nerine.tools.bundle import BundleReport

__all__ = ["bundle"]

_ABOUT = """Embeddings (textual inversions) that travel in an adapter file.

Examples:
    nerine bundle list both.safetensors
    nerine bundle pack style.safetensors -e ohwx=ohwx.safetensors -o both.safetensors
    nerine bundle unpack both.safetensors -o parts
"""
bundle = typer.Typer(
    name="bundle",
    cls=Group,
    rich_markup_mode=None,
    help=_ABOUT,
)
FILE: Path = typer.Argument(..., help="An adapter file.", show_default=False)


@bundle.command(cls=Command)
def pack(
    adapter: Path = FILE,
    embedding: list[str] = typer.Option(
        ..., "--embedding", "-e", help="TRIGGER=FILE, as often as you like.", show_default=False
    ),
    out: Path = OUT,
    allow_pickle: bool = PICKLE,
    force: bool = FORCE,
    dry_run: bool = DRY_RUN,
    as_json: bool = JSON,
) -> None:
    """Write an adapter with embeddings in it, each under its trigger word.

    Examples:
        nerine bundle pack style.safetensors -e ohwx=ohwx.safetensors -o both.safetensors
    """
    from nerine.tools.bundle import pack as put_in

    files = pairs(embedding, "--embedding")
    _show(put_in(adapter, out, files, allow_pickle=allow_pickle, force=force, dry_run=dry_run), dry_run, as_json)


@bundle.command(cls=Command)
def unpack(
    file: Path = FILE,
    out: Path = typer.Option(..., "--out", "-o", help="The folder to write into; made where it is missing."),
    allow_pickle: bool = PICKLE,
    force: bool = FORCE,
    dry_run: bool = DRY_RUN,
    as_json: bool = JSON,
) -> None:
    """Write the embeddings of a bundle into a folder.

    Each trigger word gets a file, and the adapter lies beside them.

    Examples:
        nerine bundle unpack both.safetensors -o parts
    """
    from nerine.tools.bundle import unpack as take_out

    _show(take_out(file, out, allow_pickle=allow_pickle, force=force, dry_run=dry_run), dry_run, as_json)


@bundle.command("list", cls=Command)
def list_(file: Path = FILE, allow_pickle: bool = PICKLE, as_json: bool = JSON) -> None:
    """List the embeddings that an adapter file carries.

    Examples:
        nerine bundle list both.safetensors
    """
    from nerine.tools.bundle import contents

    show(contents(file, allow_pickle=allow_pickle), as_json)


def _show(report: BundleReport, dry_run: bool, as_json: bool) -> None:
    show(report, as_json)
    if dry_run and not as_json:
        say("nothing was written (--dry-run)")
