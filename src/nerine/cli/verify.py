"""`nerine verify`: whether train = merge = export = reload holds for a file on its base, in numbers."""

from __future__ import annotations

from pathlib import Path

import typer

from nerine.cli.choices import dialects as dialects_of
from nerine.cli.shared import DEVIATES, DEVICE, FROM, JSON, PICKLE, bar, show
from nerine.cli.terminal import say

__all__ = ["verify"]


def verify(
    file: Path = typer.Argument(..., help="An adapter file, or the folder of one."),
    base: Path = typer.Option(..., "--base", help="The checkpoint that it is for: a file, an index or a folder."),
    layers: bool = typer.Option(False, "--layers", help="The figures of every layer."),
    dialects: list[str] = typer.Option(
        [], "--dialect", help="Export to this dialect only, as often as you like.", autocompletion=dialects_of
    ),
    source_dialect: str | None = FROM,
    component: str | None = typer.Option(None, help="Which part of a pipeline BASE is, where its layers do not tell."),
    samples: int = typer.Option(8, min=1, help="Random inputs for each layer."),
    doubled: int = typer.Option(4, "--fp64", min=0, help="Layers that are computed in fp64 as well."),
    seed: int = typer.Option(0, help="Of the random inputs."),
    device: str = DEVICE,
    allow_pickle: bool = PICKLE,
    as_json: bool = JSON,
) -> None:
    """Check that what was trained is what is merged and exported.

    On this base, layer by layer: training against the merged weight on random inputs; what rounding to the base's
    number format takes of the change; every dialect written and read again in memory; and how far off the programs are
    that read the file otherwise. Exit code 3: something does not hold.

    Examples:
        nerine verify style.safetensors --base sdxl.safetensors
        nerine verify style.safetensors --base sdxl.safetensors --layers --dialect kohya
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
        say(f"{report.by_layer()}\n")
    show(report, as_json)
    if not report.holds:
        raise typer.Exit(DEVIATES)
