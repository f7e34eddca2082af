"""`nerine demo`: the tiny model that ships with the package learns a new style, here and now."""

from __future__ import annotations

from pathlib import Path

import typer

from nerine.cli.choices import listed
from nerine.cli.shared import JSON, show

__all__ = ["demo"]


def demo(
    algo: str = typer.Option("lokr", help="lora, loha or lokr.", autocompletion=listed("lora", "loha", "lokr")),
    dora: bool = typer.Option(True, "--dora/--no-dora", help="Weight decomposition around it."),
    steps: int = typer.Option(160, min=1, help="Training steps."),
    seed: int = typer.Option(0, help="The same seed gives the same adapter, bit by bit, on the same machine."),
    style: str = typer.Option(
        "neon", help="neon or paper (inverted, the hard one).", autocompletion=listed("neon", "paper")
    ),
    out: Path = typer.Option(Path("nerine-demo"), help="Folder for the adapter and the picture."),
    as_json: bool = JSON,
) -> None:
    """Watch a little model learn a style, in a minute or two.

    It comes with nerine, is trained on handwritten digits 0 to 4 in the style and asked for 5 to 9. Writes the adapter
    and a picture (base / adapter / target), reloads the file into a fresh model, merges it, and shows the largest
    differences.

    Examples:
        nerine demo
        nerine demo --algo lora --no-dora --steps 200
        nerine demo --style paper --out results
    """
    from nerine.cli.progress import training_bar
    from nerine.cli.terminal import console
    from nerine.tiny.demo import DemoSettings, run_demo

    settings = DemoSettings(algo=algo, dora=dora, steps=steps, seed=seed, style=style)
    screen = console(stderr=True)
    screen.print(f"{settings.algorithm} learns [bold]{style}[/bold] from the digits 0 to 4", highlight=False)
    with training_bar(steps, screen) as progress:
        report = run_demo(settings, out, progress)
    show(report, as_json)
