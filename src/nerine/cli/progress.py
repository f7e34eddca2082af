"""A progress bar for training: steps, loss, seconds a step and time left; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nerine.cli.terminal import is_live

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["training_bar"]

_SMOOTH = 0.9  # share of the past in the shown loss


@contextmanager
def training_bar(total: int, console: Console) -> Iterator[Callable[[int, float], None]]:
    """A context that gives the callback (step, loss) to report with."""
    columns = (
        TextColumn("training"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[pace]:.3f} s/step"),
        TimeRemainingColumn(),
    )
    start, shown = 0.0, float("nan")
    moves = is_live(console.file)
    bar = Progress(*columns, console=console, disable=not moves)
    task = bar.add_task("", total=total, loss=shown, pace=0.0)

    def report(step: int, loss: float) -> None:
        nonlocal start, shown
        now = time.monotonic()
        start = start or now  # from the end of the first step on: what comes before it is not training
        shown = loss if shown != shown else _SMOOTH * shown + (1 - _SMOOTH) * loss
        pace = (now - start) / max(1, step - 1)
        bar.update(task, completed=step, loss=shown, pace=pace)
        if not moves and (step == total or step % max(1, total // 10) == 0):
            left = pace * (total - step)
            console.print(
                f"step {step}/{total}  loss {shown:.4f}  {pace:.3f} s/step  {left:.0f} s left", highlight=False
            )

    with bar:
        yield report
