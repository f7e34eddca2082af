"""`nerine extract`: an adapter out of two checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from nerine.cli.choices import algorithms, dialects, listed
from nerine.cli.shared import (
    DEVICE,
    DRY_RUN,
    DTYPE,
    FORCE,
    JSON,
    OUT,
    PICKLE,
    TARGETS,
    bar,
    dtype_of,
    pairs,
    show,
    size_of,
)
from nerine.cli.terminal import say

__all__ = ["extract"]

UNSIZED = ("full", "ia3", "diag-oft")  # their settings alone say how large they are


def _algorithms(incomplete: str) -> list[str]:
    return [*algorithms(incomplete), *listed("auto")(incomplete)]


ALGO: str = typer.Option(
    "lora",
    "--algo",
    help="lora, lokr, loha, full, ia3, diag-oft, ..., or auto with --size.",
    autocompletion=_algorithms,
)
MODE: str | None = typer.Option(
    None,
    "--mode",
    help="A mode of LyCORIS: fixed, threshold, ratio, quantile or full.",
    autocompletion=listed("fixed", "threshold", "ratio", "quantile", "full"),
)


def extract(
    base: Path = typer.Argument(..., help="The checkpoint before: a file, an index of pieces, or a folder."),
    tuned: Path = typer.Argument(..., help="The checkpoint after; layout and number format may be others."),
    out: Path = OUT,
    algo: str = ALGO,
    rank: int | None = typer.Option(None, min=1, help="The rank of all layers."),
    energy: float | None = typer.Option(None, help="The share of the squared difference that each layer keeps: 0.9."),
    threshold: float | None = typer.Option(None, help="As many ranks as have singular values above this."),
    ratio: float | None = typer.Option(None, help="As many as are above this part of the largest."),
    quantile: float | None = typer.Option(None, help="As many as make up this part of their sum."),
    size: str | None = typer.Option(None, help="The size of the file, as in 20MB, spent where it counts most."),
    mode: str | None = MODE,
    param: float | None = typer.Option(None, help="The number of that mode."),
    conv_rank: int | None = typer.Option(None, min=1, help="With --rank: that of layers with a kernel."),
    algos: str | None = typer.Option(None, help="With --algo auto: which to choose from, as in lora,lokr,full."),
    settings: list[str] = typer.Option([], "--set", help="A setting of the algorithm, as in --set factor=8."),
    dora: bool = typer.Option(False, "--dora", help="Magnitudes apart from directions."),
    tucker: bool = typer.Option(False, "--tucker", help="Convolutions as a small core between two matrices."),
    train_norm: bool = typer.Option(False, "--train-norm", help="Norms too, and biases where they alone changed."),
    targets: list[str] = TARGETS,
    min_change: float = typer.Option(0.0, help="Leave out layers that changed by no more than this part of them."),
    dialect: str = typer.Option("kohya", help="kohya, lycoris, diffusers, peft, comfy, ...", autocompletion=dialects),
    component: str | None = typer.Option(None, help="The part of a pipeline that it is, where names do not tell."),
    hashes: bool = typer.Option(False, "--hashes", help="Write the hashes by which A1111 knows files."),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="All layers in the table, not the 20 worst."),
    dtype: str | None = DTYPE,
    device: str = DEVICE,
    allow_pickle: bool = PICKLE,
    force: bool = FORCE,
    dry_run: bool = DRY_RUN,
    as_json: bool = JSON,
) -> None:
    """Extract the adapter that turns one checkpoint into another.

    One of --rank, --energy, --threshold, --ratio, --quantile, --mode and --size says how large it is to be.

    Examples:
        nerine extract sdxl.safetensors mine.safetensors -o mine-lora.safetensors --rank 32
        nerine extract sdxl.safetensors mine.safetensors -o mine-20.safetensors --algo auto --size 20MB
    """
    sizes: dict[str, Any] = {
        "rank": rank,
        "energy": energy,
        "threshold": threshold,
        "ratio": ratio,
        "quantile": quantile,
    }
    sizes |= {"size": size, "mode": mode}
    _check_usage(algo, sizes, param is not None, settings)
    from nerine.tools.extract import extract as run

    options: dict[str, Any] = {**sizes, "size": None if size is None else size_of(size), "param": param}
    options |= {"conv_rank": conv_rank, "dora": dora, "tucker": tucker, "train_norm": train_norm}
    options |= {"algorithm": algo, "algos": None if algos is None else [name.strip() for name in algos.split(",")]}
    options |= {"settings": {key: _value(text) for key, text in pairs(settings, "--set").items()}}
    options |= {"targets": targets or "all", "min_change": min_change, "dialect": dialect, "component": component}
    options |= {"hashes": hashes, "dtype": dtype_of(dtype), "device": device, "allow_pickle": allow_pickle}
    with bar("extracting") as progress:
        report = run(base, tuned, out, **options, force=force, dry_run=dry_run, progress=progress)
    say(report.verbose()) if verbose and not as_json else show(report, as_json)


def _check_usage(algo: str, sizes: dict[str, Any], has_param: bool, settings: list[str]) -> None:
    """Whether one thing says how large the adapter is to be."""
    given = [f"--{name}" for name, value in sizes.items() if value is not None]
    if len(given) > 1:
        raise typer.BadParameter(f"{' and '.join(given)} each say how large it is to be; give one of them")
    sized = algo in UNSIZED or any(text.startswith(("rank=", "full_matrix=")) for text in settings)
    if not given and not sized:
        hint = "--size" if algo == "auto" else f"one of {', '.join(f'--{name}' for name in sizes)}"
        raise typer.BadParameter(f"say how large the adapter is to be: give {hint}, as in --size 20MB or --rank 32")
    if algo == "auto" and given != ["--size"]:
        raise typer.BadParameter(f"--algo auto weighs algorithms for a size; give --size instead of {given[0]}")
    if has_param and given != ["--mode"]:
        raise typer.BadParameter("--param is the number of a --mode; say which")


def _value(text: str) -> Any:
    """A number, true, false or null as JSON has them; else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
