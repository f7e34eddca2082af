"""Layer names as files have them: without their dots, which cannot be undone but by looking the name up."""

from __future__ import annotations

__all__ = ["flatten"]


def flatten(path: str) -> str:
    """A dotted layer path as one word."""
    return path.replace(".", "_")
