"""What a training run looks like in the terminal: one line that moves, and plain lines where there is no terminal.

Ctrl-C once asks the run to end after its step, with a checkpoint; twice ends it at once.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nerine.cli.terminal import console, is_live
from nerine.train.watching import Watcher

__all__ = ["TerminalWatcher", "watching"]

_SMOOTH = 0.95  # share of the past in the loss that is shown
_LINES = 20  # lines of a run where there is no terminal


class TerminalWatcher(Watcher):
    """Shows a run on stderr; in processes other than the first it is silent."""

    def __init__(self, console: Console, speaks: bool) -> None:
        self.console = console
        self.speaks = speaks
        self.asked = False
        self.is_live = is_live(console.file)
        self._bar: Progress | None = None
        self._task: Any = None
        self._loss = float("nan")
        self._first, self._steps, self._seconds = 0, 1, 0.0
        self._said = 0.0

    # -- before ----------------------------------------------------------------------------------------------------
    def preparing(self, what: str, done: int, total: int) -> None:
        if not self.speaks:
            return
        if not self.is_live:
            if done == total or (self._said and time.monotonic() - self._said > 10):
                self._say(f"{what}: {done} of {total}")
                self._said = time.monotonic()
            return
        self._show(
            TextColumn("{task.fields[what]}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeRemainingColumn()
        )
        assert self._bar is not None
        if self._task is None:
            self._task = self._bar.add_task("", total=total, what=what)
        self._bar.update(self._task, completed=done, total=total, what=what)
        if done == total:
            self.close()

    def begins(self, first: int, steps: int, said: str) -> None:
        self.close()
        self._first, self._steps = first, steps
        went_on = f", from step {first} on" if first else ""
        self._say(f"training {said}{went_on}")

    # -- steps -----------------------------------------------------------------------------------------------------
    def stepped(self, row: Mapping[str, Any]) -> None:
        loss = float(row["loss"])
        self._loss = loss if self._loss != self._loss else _SMOOTH * self._loss + (1 - _SMOOTH) * loss
        self._seconds += float(row["seconds"])
        if not self.speaks:
            return
        step = int(row["step"])
        pace = self._seconds / max(1, step - self._first)
        memory = f"{row['memory'] / 1e9:.1f} GB"
        if not self.is_live:
            if step % max(1, self._steps // _LINES) == 0 or step == self._steps:
                left = pace * (self._steps - step)
                self._say(
                    f"step {step}/{self._steps}  loss {self._loss:.4f}  lr {row['lr']:.2e}  {pace:.3f} s/step  "
                    f"{memory}  {left:.0f} s left"
                )
            return
        self._show(
            TextColumn("step"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  lr {task.fields[lr]:.1e}  {task.fields[pace]:.2f} s/step"),
            TextColumn("{task.fields[memory]}"),
            TimeRemainingColumn(compact=True),
        )
        assert self._bar is not None
        shown = {"loss": self._loss, "lr": row["lr"], "pace": pace, "memory": memory}
        if self._task is None:
            self._task = self._bar.add_task("", total=self._steps, completed=self._first, **shown)
        self._bar.update(self._task, completed=step, **shown)

    def validated(self, step: int, loss: float) -> None:
        self._say(f"step {step}: held-out loss {loss:.4f}")

    def sampled(self, step: int, files: list[Path]) -> None:
        if files:
            self._say(f"step {step}: {len(files)} pictures in {files[0].parent}")

    def saved(self, step: int, folder: Path) -> None:
        self._say(f"step {step}: checkpoint {folder}")

    def stop(self) -> bool:
        return self.asked

    def ask(self) -> None:
        """Let the run end after the step that it is at."""
        self.asked = True
        self._say("ending after this step, with a checkpoint; Ctrl-C again ends at once")

    # -- the terminal ----------------------------------------------------------------------------------------------
    def _show(self, *columns: Any) -> None:
        if self._bar is None:
            self._bar = Progress(*columns, console=self.console, transient=True, refresh_per_second=4)
            self._bar.start()

    def _say(self, text: str) -> None:
        if self.speaks:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None


@contextmanager
def watching() -> Iterator[TerminalWatcher]:
    """A watcher for the length of a run, and Ctrl-C in its hands."""
    watcher = TerminalWatcher(console(stderr=True), os.environ.get("RANK", "0") == "0")

    def interrupted(number: int, frame: Any) -> None:
        if watcher.asked:
            raise KeyboardInterrupt
        watcher.ask()

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield watcher
    finally:
        watcher.close()
        signal.signal(signal.SIGINT, before)
