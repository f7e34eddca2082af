"""`nerine presets`: which layers words such as "attn-only" stand for."""

from __future__ import annotations

from pathlib import Path

import typer

from nerine.cli.choices import presets as names_of
from nerine.cli.shared import JSON, PICKLE, show
from nerine.cli.terminal import say

__all__ = ["presets"]


def presets(
    name: str | None = typer.Argument(
        None, help="One preset, or a TOML file of your own.", show_default=False, autocompletion=names_of
    ),
    model: Path | None = typer.Option(None, "--model", help="A checkpoint: how many of its layers each chooses."),
    layers: bool = typer.Option(False, "--layers", help="With --model: the paths of the layers."),
    allow_pickle: bool = PICKLE,
    as_json: bool = JSON,
) -> None:
    """List the presets: words for the layers that are trained.

    Or show what is in one, or count what they choose in a checkpoint.

    Examples:
        nerine presets
        nerine presets attn-only
        nerine presets attn-only --model sdxl.safetensors --layers
    """
    if layers and model is None:
        raise typer.BadParameter("--layers needs the checkpoint in which they are chosen: give --model")
    from nerine.tools.planning import PRESETS, preset_text, presets_report

    if name is not None and model is None and not as_json:
        say(preset_text(name).rstrip())
        return
    report = presets_report(PRESETS if name is None else [name], model, allow_pickle=allow_pickle)
    show(report, as_json)
    if layers and not as_json:
        for row in report.rows:
            say("\n".join([f"\n{row.name}", *(f"  {path}" for path in row.paths)]))
