"""`nerine inspect`: what is in an adapter file, on the terminal, as JSON or as a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from nerine.cli.choices import dialects
from nerine.cli.shared import DEVIATES, DEVICE, FORCE, JSON, PICKLE, bar, show
from nerine.cli.terminal import say

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nerine.tools.inspect.text import Sheet

__all__ = ["inspect"]


def inspect(
    file: Path = typer.Argument(..., help="An adapter file, or the folder of one.", show_default=False),
    base: Path | None = typer.Option(None, "--base", help="The checkpoint of the model that it is for."),
    layers: bool = typer.Option(False, "--layers", help="Every layer, not the blocks alone."),
    html: Path | None = typer.Option(None, "--html", help="Write the report as one page for a browser, too."),
    dialect: str | None = typer.Option(None, "--dialect", help="Read it as this dialect.", autocompletion=dialects),
    strict: bool = typer.Option(False, "--strict", help="Exit with 3 where a layer is suspicious."),
    force: bool = FORCE,
    device: str = DEVICE,
    allow_pickle: bool = PICKLE,
    as_json: bool = JSON,
) -> None:
    """Show what is in an adapter file.

    Its algorithm, its ranks, its training settings, and the size of every layer's change. Layers that look wrong are
    listed: NaN, no change at all, far too large, collapsed to one direction. With --base the changes are measured
    against the weights of the model.

    Examples:
        nerine inspect style.safetensors
        nerine inspect style.safetensors --base sdxl.safetensors --html report.html
        nerine inspect style.safetensors --json --strict
    """
    from nerine.files.atomic import write_text
    from nerine.tools.inspect import inspect as look
    from nerine.tools.inspect.text import layer_sheets, sheets_of
    from nerine.tools.output import check_output

    target = None if html is None else check_output(html, [file, *([base] if base else [])], force)
    with bar("measuring") as progress:
        report = look(file, base=base, allow_pickle=allow_pickle, dialect=dialect, progress=progress, device=device)
    if target is not None:
        from nerine.tools.pages import page

        write_text(target, page(report))
    if as_json:
        show(report, True)
    else:
        _draw([*sheets_of(report), *(layer_sheets(report) if layers else ())], "red" if report.findings else "green")
        if target is not None:
            say(f"\nwritten: {target}")
    if strict and not report.healthy:
        raise typer.Exit(DEVIATES)


def _draw(sheets: Iterable[Sheet], verdict: str) -> None:
    """The tables in colour where the terminal has any. Texts come from files: none of them is markup."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from nerine.cli.terminal import console

    screen = console()
    for i, sheet in enumerate(sheets):
        style = verdict if sheet.title.startswith("Suspicious") else "bold"
        screen.print(Text(f"{chr(10) if i else ''}{sheet.title}", style=style))
        if not sheet.rows:
            continue
        filled = [at for at, name in enumerate(sheet.head) if not name or any(row[at] for row in sheet.rows)]
        table = Table(box=SIMPLE_HEAD, show_header=any(sheet.head), pad_edge=False, show_edge=False)
        for at in filled:
            name, cells = sheet.head[at], [row[at] for row in sheet.rows]
            numeric = at and at != sheet.free and all(_is_number(cell) for cell in cells if cell) and any(cells)
            table.add_column(
                name,
                justify="right" if numeric else "left",
                overflow="fold",
                no_wrap=at != sheet.free,
                style="cyan" if at == len(sheet.head) - 1 and not name and sheet.free is None else None,
            )
        for row in sheet.rows:
            table.add_row(*(Text(row[at]) for at in filled))
        screen.print(table)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
