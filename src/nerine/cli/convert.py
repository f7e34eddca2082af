"""`nerine convert`: adapters for another program, as another algorithm, or both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from nerine.cli.choices import algorithms, dialects
from nerine.cli.shared import DEVICE, DRY_RUN, DTYPE, FORCE, FROM, JSON, OUT, PICKLE, bar, dtype_of, pairs, show

__all__ = ["convert"]


def convert(
    file: Path = typer.Argument(..., help="The adapter: a file, or a folder of PEFT."),
    out: Path = OUT,
    dialect: str | None = typer.Option(
        None,
        help="lycoris, kohya, diffusers, peft, comfy, ...; as it was if left out.",
        autocompletion=dialects,
    ),
    to: str | None = typer.Option(
        None, help="The algorithm: lora, loha, lokr, dylora, glora, full, ia3, ...", autocompletion=algorithms
    ),
    rank: int | None = typer.Option(None, min=1, help="The rank where it is fitted."),
    tol: float | None = typer.Option(None, help="For lora: the least rank that keeps this relative error."),
    dora: bool = typer.Option(True, "--dora/--no-dora", help="Leave DoRA around it, or multiply it in (with --base)."),
    settings: list[str] = typer.Option([], "--set", help="A setting of the algorithm, as in --set factor=8."),
    base: Path | None = typer.Option(None, help="The checkpoint that the adapter is for, where weights are needed."),
    source_dialect: str | None = FROM,
    component: str | None = typer.Option(None, help="The part of a pipeline that it is for, where names do not tell."),
    hashes: bool = typer.Option(False, "--hashes", help="Write the hashes by which A1111 knows files."),
    dtype: str | None = DTYPE,
    device: str = DEVICE,
    allow_pickle: bool = PICKLE,
    force: bool = FORCE,
    dry_run: bool = DRY_RUN,
    as_json: bool = JSON,
) -> None:
    """Convert adapters between programs and between algorithms.

    Between dialects exactly or not at all.

    LoHa, LoKr, T-LoRA, DyLoRA, Tucker and (with --base) GLoRA become a LoRA exactly, anything a full difference, and
    what is neither is fitted: of a --rank, or within --tol. The table says how well for each layer.

    Examples:
        nerine convert style.safetensors -o for-comfy.safetensors --dialect comfy
        nerine convert style-loha.safetensors -o style-lora.safetensors --to lora --dialect kohya
        nerine convert style.safetensors -o small.safetensors --to lokr --set factor=8 --rank 8
    """
    from nerine.tools.convert import convert as run

    options: dict[str, Any] = {
        "dialect": dialect,
        "to": to,
        "rank": rank,
        "tol": tol,
        "dora": dora,
        "settings": {key: _value(text) for key, text in pairs(settings, "--set").items()},
        "base": base,
        "source_dialect": source_dialect,
        "component": component,
        "hashes": hashes,
    }
    options |= {"dtype": dtype_of(dtype), "device": device, "allow_pickle": allow_pickle}
    with bar("converting") as progress:
        report = run(file, out, **options, force=force, dry_run=dry_run, progress=progress)
    show(report, as_json)


def _value(text: str) -> Any:
    """A number, true, false or null as JSON has them; else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
