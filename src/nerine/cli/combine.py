"""`nerine combine`: several adapters as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from nerine.cli.choices import dialects, listed
from nerine.cli.shared import DEVICE, DRY_RUN, DTYPE, FORCE, JSON, OUT, PICKLE, bar, dtype_of, show, split_strength

__all__ = ["combine"]

METHODS = ("concat", "svd", "linear", "ties", "dare", "dare_linear", "dare_ties", "magnitude_prune")


def combine(
    adapters: list[str] = typer.Argument(
        ..., help="Adapters, each FILE, FILE:0.8 or FILE:unet=0.8,text_encoder=0.4 (patterns; the last match counts)."
    ),
    out: Path = OUT,
    method: str = typer.Option(
        "concat",
        help="concat, svd, linear, ties, dare, dare_linear, dare_ties or magnitude_prune.",
        autocompletion=listed(*METHODS),
    ),
    to: str | None = typer.Option(
        None, help="lora or full: what comes of what is no low-rank product.", autocompletion=listed("lora", "full")
    ),
    rank: int | None = typer.Option(None, min=1, help="The rank of the result (svd, linear, and what is fitted)."),
    density: float = typer.Option(0.5, help="The share of the entries that count (ties, dare, magnitude_prune)."),
    sign: str = typer.Option(
        "total", help="How ties elects a sign: total or frequency.", autocompletion=listed("total", "frequency")
    ),
    seed: int = typer.Option(0, help="Of the draws of dare."),
    base: Path | None = typer.Option(None, help="The checkpoint that all are for (for DoRA, OFT, GLoRA, IA3)."),
    dialect: str | None = typer.Option(
        None, help="The dialect to write; that of the first if left out.", autocompletion=dialects
    ),
    component: str | None = typer.Option(None, help="The part of a pipeline that they are for."),
    dtype: str | None = DTYPE,
    device: str = DEVICE,
    allow_pickle: bool = PICKLE,
    force: bool = FORCE,
    dry_run: bool = DRY_RUN,
    as_json: bool = JSON,
) -> None:
    """Combine adapters, each at its strength, into one file.

    concat is exact for all low-rank adapters: the file adds what they would add together. svd cuts that down to a rank.

    Examples:
        nerine combine style.safetensors:0.7 face.safetensors:0.3 -o both.safetensors
        nerine combine a.safetensors b.safetensors -o both.safetensors --method svd --rank 32
    """
    from nerine.tools.combine import combine as run

    options: dict[str, Any] = {
        "method": method,
        "to": to,
        "rank": rank,
        "density": density,
        "sign": sign,
        "seed": seed,
        "base": base,
        "dialect": dialect,
        "component": component,
    }
    options |= {"dtype": dtype_of(dtype), "device": device, "allow_pickle": allow_pickle}
    told = [split_strength(text) for text in adapters]
    with bar("combining") as progress:
        report = run(told, out, **options, force=force, dry_run=dry_run, progress=progress)
    show(report, as_json)
