"""`nerine merge`: adapters into a checkpoint, or out of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from nerine.cli.shared import (
    DEVIATES,
    DEVICE,
    DRY_RUN,
    DTYPE,
    FORCE,
    JSON,
    OUT,
    PICKLE,
    bar,
    dtype_of,
    show,
    split_strength,
)

__all__ = ["merge"]


def merge(
    base: Path = typer.Argument(..., help="Checkpoint: a .safetensors file, an index of one in pieces, or a folder."),
    adapters: list[str] = typer.Argument(
        ..., help="Adapters, each FILE, FILE:0.8 or FILE:unet=0.8,text_encoder=0.4 (patterns; the last match counts)."
    ),
    out: Path = OUT,
    dtype: str | None = DTYPE,
    stochastic: bool = typer.Option(False, "--stochastic", help="Round by chance, so that small changes survive."),
    seed: int = typer.Option(0, help="Of rounding by chance."),
    verify: int = typer.Option(0, "--verify", help="Compute this many changed tensors anew in fp64 and compare."),
    unmerge: bool = typer.Option(False, "--unmerge", help="Take the adapters out of BASE again."),
    original: Path | None = typer.Option(
        None, help="With --unmerge: the checkpoint before the merge; gives exact bits."
    ),
    strict: bool = typer.Option(False, "--strict", help="Refuse an adapter of which any key is not used."),
    component: str | None = typer.Option(None, help="Which part of a pipeline BASE is, where its layers do not tell."),
    device: str = DEVICE,
    allow_pickle: bool = PICKLE,
    force: bool = FORCE,
    dry_run: bool = DRY_RUN,
    as_json: bool = JSON,
) -> None:
    """Merge adapters into a checkpoint, or take them out again.

    Adapters may be of any algorithms. The changes are summed in fp32 and rounded once. Memory for a few tensors is
    enough, whatever the size of the model. Exit code 3: --verify found another number than was written.

    Examples:
        nerine merge sdxl.safetensors style.safetensors:0.8 -o merged.safetensors
        nerine merge sdxl.safetensors style.safetensors face.safetensors:unet=0.6 -o m.safetensors --verify 8
        nerine merge merged.safetensors style.safetensors -o before.safetensors --unmerge --original sdxl.safetensors
    """
    from nerine.errors import OptionError
    from nerine.tools.merge import merge as merge_in
    from nerine.tools.merge import unmerge as take_out

    told = [split_strength(text) for text in adapters]
    options: dict[str, Any] = {"component": component, "device": device, "allow_pickle": allow_pickle}
    options |= {"force": force, "dry_run": dry_run}
    if unmerge and (dtype or stochastic or verify or strict):
        raise OptionError("--unmerge goes without --dtype, --stochastic, --verify and --strict: it gives back what was")
    if original is not None and not unmerge:
        raise OptionError("--original goes with --unmerge")
    if not unmerge:
        options |= {"dtype": dtype_of(dtype), "seed": seed if stochastic else None, "verify": verify, "strict": strict}
    with bar("unmerging" if unmerge else "merging") as progress:
        if unmerge:
            report = take_out(base, told, out, original=original, **options, progress=progress)
        else:
            report = merge_in(base, told, out, **options, progress=progress)
    show(report, as_json)
    if report.verified is not None and not report.verified.holds:
        raise typer.Exit(DEVIATES)
