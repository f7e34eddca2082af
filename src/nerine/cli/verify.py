"""`nerine verify`: whether train = merge = export = reload holds for a file on its base, in numbers."""

from __future__ import annotations

from pathlib import Path

import typer

from nerine.cli.shared import DEVIATES, DEVICE, JSON, PICKLE, bar, show

__all__ = ["verify"]


def verify(
    file: Path = typer.Argument(..., help="An adapter file, or the folder of one."),
    base: Path = typer.Option(..., "--base", help="The checkpoint that it is for: a file, an index or a folder."),
    layers: bool = typer.Option(False, "--layers", help="The figures of every layer."),
    dialects: list[str] = typer.Option([], "--dialect", help="Export to this dialect only, as often as you like."),
    source_dialect: str | None = typer.Option(None, "--from", help="The dialect of FILE, where it cannot be told."),
    component: str | None = typer.Option(None, help="Which part of a pipeline BASE is, where its layers do not tell."),
    samples: int = typer.Option(8, min=1, help="Random inputs for each layer."),
    doubled: int = typer.Option(4, "--fp64", min=0, help="Layers that are computed in fp64 as well."),
    seed: int = typer.Option(0, help="Of the random inputs."),
    device: str = DEVICE,
    allow_pickle: bool = PICKLE,
    as_json: bool = JSON,
) -> None:
    """Check on this base that what was trained is what is merged, exported and read again, layer by layer.

    Training against the merged weight on random inputs; what rounding to the base's number format takes of the change;
    every dialect written and read again in memory; and how far off the programs are that read the file otherwise.
    Exit code 3: something does not hold.

    Example: [bold]nerine verify style.safetensors --base sdxl.safetensors --layers[/bold]
    """
    from nerine.tools.verify import verify as check

    with bar("verifying") as progress:
        report = check(
            file,
            base,
            device=device,
            dialects=dialects or None,
            samples=samples,
            doubled=doubled,
            seed=seed,
            source_dialect=source_dialect,
            component=component,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    if layers and not as_json:
        typer.echo(f"{report.by_layer()}\n")
    show(report, as_json)
    if not report.holds:
        raise typer.Exit(DEVIATES)
