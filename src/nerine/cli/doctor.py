"""`nerine doctor`: whether this installation is sound, and what is missing for what."""

from __future__ import annotations

import sys

import typer

from nerine.cli.shared import DEVIATES, JSON, show
from nerine.cli.terminal import say

__all__ = ["doctor"]


def doctor(
    self_test: bool = typer.Option(True, "--self-test/--no-self-test", help="Try the promise on every device."),
    as_json: bool = JSON,
) -> None:
    """Check the installation: versions, devices, extras, and a self-test.

    The self-test trains, merges, exports and reloads every algorithm on a small layer, on every device that torch
    finds, and shows the largest differences. Exit code 3: something is wrong.

    Examples:
        nerine doctor
        nerine doctor --json > doctor.json
    """
    from nerine.cli.terminal import paint
    from nerine.tools.doctor import examine

    report = examine(self_test)
    if as_json:
        show(report, True)
    else:
        verdict = "sound" if report.is_sound else "something is wrong"
        for title, text in report.sections():
            say(f"{paint(title, 'bold', sys.stdout)}\n{text}\n")
        say(paint(f"This installation: {verdict}", "green" if report.is_sound else "bold red", sys.stdout))
    if not report.is_sound:
        raise typer.Exit(DEVIATES)
