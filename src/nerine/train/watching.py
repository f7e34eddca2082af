"""Watcher: who looks on while a run is made, such as a progress bar. The trainer itself prints nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Watcher"]


class Watcher:
    """Hears what happens and does nothing; subclass it, and override what you want to know."""

    def preparing(self, what: str, done: int, total: int) -> None:
        """Pictures are being encoded, say; `done` of `total`."""

    def begins(self, first: int, steps: int, said: str) -> None:
        """The first step is about to be made, after `first` that were made before; `said` describes the run."""

    def stepped(self, row: Mapping[str, Any]) -> None:
        """A step was made: its line in the history."""

    def validated(self, step: int, loss: float) -> None:
        """The held-out pictures were tried."""

    def sampled(self, step: int, files: list[Path]) -> None:
        """Pictures were drawn."""

    def saved(self, step: int, folder: Path) -> None:
        """A checkpoint was written."""

    def stop(self) -> bool:
        """Whether the run is to end after this step, with a checkpoint to go on from."""
        return False
