"""`nerine resize`: adapters with fewer ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from nerine.cli.choices import dialects, listed
from nerine.cli.shared import DEVICE, DRY_RUN, DTYPE, FORCE, FROM, JSON, OUT, PICKLE, bar, dtype_of, show, size_of

__all__ = ["resize"]


def resize(
    file: Path = typer.Argument(..., help="The adapter: a file, or a folder of PEFT."),
    out: Path = OUT,
    rank: int | None = typer.Option(None, min=1, help="The rank; with another rule, the most that a layer may keep."),
    conv_rank: int | None = typer.Option(None, min=1, help="The same for layers with a kernel."),
    energy: float | None = typer.Option(None, help="The share of Σσ² that each layer keeps, as in 0.95."),
    size: str | None = typer.Option(None, help="The size of the file, as in 20MB, shared out where it counts most."),
    method: str | None = typer.Option(
        None,
        help="A rule of sd-scripts: sv_ratio, sv_fro or sv_cumulative.",
        autocompletion=listed("sv_ratio", "sv_fro", "sv_cumulative"),
    ),
    param: float | None = typer.Option(None, help="The number of that rule."),
    base: Path | None = typer.Option(None, help="The checkpoint that it is for: DoRA's magnitudes are fitted anew."),
    dialect: str | None = typer.Option(
        None, help="The dialect to write; as it was if left out.", autocompletion=dialects
    ),
    source_dialect: str | None = FROM,
    component: str | None = typer.Option(None, help="The part of a pipeline that it is for, where names do not tell."),
    dtype: str | None = DTYPE,
    device: str = DEVICE,
    allow_pickle: bool = PICKLE,
    force: bool = FORCE,
    dry_run: bool = DRY_RUN,
    as_json: bool = JSON,
) -> None:
    """Reduce the ranks of an adapter, or its size in bytes.

    For LoRA, LoKr, LoHa, GLoRA, T-LoRA and DyLoRA, with or without DoRA around them. Each keeps the best of its ranks;
    the table says what every layer loses. What has no rank stays as it is.

    Examples:
        nerine resize style.safetensors -o style-8.safetensors --rank 8
        nerine resize style.safetensors -o style-20.safetensors --size 20MB
        nerine resize style.safetensors -o style-95.safetensors --energy 0.95
    """
    from nerine.tools.resize import resize as run

    options: dict[str, Any] = {
        "rank": rank,
        "conv_rank": conv_rank,
        "energy": energy,
        "size": None if size is None else size_of(size),
        "method": method,
        "param": param,
        "base": base,
        "dialect": dialect,
        "source_dialect": source_dialect,
        "component": component,
    }
    options |= {"dtype": dtype_of(dtype), "device": device, "allow_pickle": allow_pickle}
    with bar("resizing") as progress:
        report = run(file, out, **options, force=force, dry_run=dry_run, progress=progress)
    show(report, as_json)
