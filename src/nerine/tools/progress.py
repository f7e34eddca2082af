"""How a tool says how far it is: a function that is told the steps done, the steps in all, and what is at hand."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, what: str) -> None:
    """Says nothing."""
