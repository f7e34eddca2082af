"""`nerine demo`: the tiny model that ships with the package learns a new style, here and now."""

from __future__ import annotations

import json
from pathlib import Path

import typer

__all__ = ["demo"]


def demo(
    algo: str = typer.Option("lokr", help="lora, loha or lokr."),
    dora: bool = typer.Option(True, "--dora/--no-dora", help="Weight decomposition around it."),
    steps: int = typer.Option(160, min=1, help="Training steps."),
    seed: int = typer.Option(0, help="The same seed gives the same adapter, bit by bit, on the same machine."),
    style: str = typer.Option("neon", help="neon or paper (inverted, the hard one)."),
    out: Path = typer.Option(Path("nerine-demo"), help="Folder for the adapter and the picture."),
    as_json: bool = typer.Option(False, "--json", help="The report as JSON on stdout."),
) -> None:
    """Fine-tune the embedded text-to-image model on a style, on this machine, in a minute or two.

    It is trained on handwritten digits 0 to 4 in the style and asked for 5 to 9. Writes the adapter and a picture
    (base / adapter / target), reloads the file into a fresh model, merges it, and shows the largest differences.

    Example: [bold]nerine demo --algo lora --no-dora --steps 200[/bold]
    """
    from rich.console import Console

    from nerine.cli.progress import training_bar
    from nerine.tiny.demo import DemoSettings, run_demo

    settings = DemoSettings(algo=algo, dora=dora, steps=steps, seed=seed, style=style)
    console = Console(stderr=True)
    console.print(f"{settings.algorithm} learns [bold]{style}[/bold] from the digits 0 to 4", highlight=False)
    with training_bar(steps, console) as progress:
        report = run_demo(settings, out, progress)
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
