"""`nerine plan`: what attaching would do on a checkpoint, before anything is trained."""

from __future__ import annotations

from pathlib import Path

import typer

from nerine.cli.choices import algorithms
from nerine.cli.choices import targets as targets_of
from nerine.cli.shared import JSON, PICKLE, pairs, show
from nerine.cli.terminal import say

__all__ = ["plan"]


def plan(
    base: Path = typer.Argument(..., help="Checkpoint: a .safetensors file, an index of one in pieces, or a folder."),
    algo: str | None = typer.Option(
        None, "--algo", help="lora, loha, lokr, boft, ...; lora if left out.", autocompletion=algorithms
    ),
    rank: int | None = typer.Option(None, "--rank", help="Short for --set rank=N."),
    alpha: float | None = typer.Option(None, "--alpha", help="Short for --set alpha=X."),
    dora: bool = typer.Option(False, "--dora", help="Weight decomposition around it."),
    settings: list[str] = typer.Option([], "--set", help="A setting of the algorithm, as in --set factor=8."),
    targets: list[str] = typer.Option(
        ["all"],
        "--targets",
        help="Preset or pattern of layers, as often as you like; !PATTERN leaves out.",
        autocompletion=targets_of,
    ),
    rules: Path | None = typer.Option(None, "--rules", help="A file of rules (TOML) in place of --algo."),
    train_norm: bool = typer.Option(False, "--train-norm", help="Norms are trained as well."),
    layers: bool = typer.Option(False, "--layers", help="Every layer, not the blocks alone."),
    allow_pickle: bool = PICKLE,
    as_json: bool = JSON,
) -> None:
    """Show what attaching adapters to a checkpoint would do.

    Which layers get one, and how much that is in values, file and memory. Names and shapes are read and nothing else;
    the program of the model need not be installed.

    Examples:
        nerine plan sdxl.safetensors --rank 16
        nerine plan flux.safetensors --algo lokr --rank 8 --set factor=8 --dora --targets attn-only
    """
    if rules is not None and (algo or rank is not None or alpha is not None or dora or settings):
        raise typer.BadParameter("a file of rules has the algorithms in it: leave out --algo, --rank, --dora and --set")
    from nerine.tools.planning import algorithm_of, plan_checkpoint

    given = pairs(settings, "--set")
    short = {"rank": rank, "alpha": alpha}
    for key, value in short.items():
        if value is not None and key in given:
            raise typer.BadParameter(f"{key} is given twice, by --{key} and by --set")
    given |= {key: str(value) for key, value in short.items() if value is not None}
    what = algorithm_of(algo or "lora", given, dora) if rules is None else rules
    report = plan_checkpoint(base, what, targets=targets, train_norm=train_norm, allow_pickle=allow_pickle)
    if layers and not as_json:
        say(f"{report.by_layer()}\n")
    show(report, as_json)
