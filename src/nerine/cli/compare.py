"""`nerine compare`: how far two adapter files are apart."""

from __future__ import annotations

from pathlib import Path

import typer

from nerine.cli.choices import dialects
from nerine.cli.shared import DEVIATES, DEVICE, JSON, PICKLE, bar, show

__all__ = ["compare"]


def compare(
    a: Path = typer.Argument(..., help="An adapter file, or the folder of one.", show_default=False),
    b: Path = typer.Argument(..., help="Another one, in any dialect and of any algorithm.", show_default=False),
    base: Path | None = typer.Option(None, "--base", help="The checkpoint of the model that they are for."),
    tol: float | None = typer.Option(
        None, "--tol", min=0.0, help="Exit with 3 where a layer is further apart than this, or in one file alone."
    ),
    dialect_a: str | None = typer.Option(
        None, "--dialect-a", help="Read the first one as this dialect.", autocompletion=dialects
    ),
    dialect_b: str | None = typer.Option(
        None, "--dialect-b", help="Read the second one as this dialect.", autocompletion=dialects
    ),
    device: str = DEVICE,
    allow_pickle: bool = PICKLE,
    as_json: bool = JSON,
) -> None:
    """Compare the changes that two adapters make, layer by layer.

    Shown are their angle, sizes, distance and directions. Layers are matched whatever the files call them. The distance
    of two changes is |A - B| / max(|A|, |B|). With --base those that depend on the weights (DoRA, rotations,
    multipliers, GLoRA) are compared, too.

    Examples:
        nerine compare before.safetensors after.safetensors
        nerine compare before.safetensors after.safetensors --base sdxl.safetensors --tol 1e-3
    """
    from nerine.tools.compare import compare as look

    with bar("comparing") as progress:
        report = look(
            a,
            b,
            base=base,
            dialects=(dialect_a, dialect_b),
            allow_pickle=allow_pickle,
            progress=progress,
            device=device,
        )
    show(report, as_json)
    if tol is not None and (report.largest is None or report.largest > tol):
        raise typer.Exit(DEVIATES)
