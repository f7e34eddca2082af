"""Checks of settings that several algorithms share; each returns nothing and raises `OptionError` in words."""

from __future__ import annotations

import math

from nerine.errors import OptionError

__all__ = ["check_alpha", "check_choice", "check_flag", "check_rank", "scale_of"]


def _found(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"


def check_rank(owner: str, rank: object) -> None:
    """A rank is a whole number of at least one."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise OptionError(f"{owner}: rank must be a whole number of at least 1, got {_found(rank)}")


def check_alpha(owner: str, alpha: object) -> None:
    """Alpha is None (= rank) or a positive finite number."""
    if alpha is None:
        return
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise OptionError(
            f"{owner}: alpha must be a positive number or None (= rank), got {_found(alpha)}; "
            "to switch an adapter off, set its strength to 0"
        )


def check_flag(owner: str, **flags: object) -> None:
    """Flags are True or False, never strings."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise OptionError(f"{owner}: {name} must be True or False, got {_found(value)}")


def check_choice(owner: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """One of a few words."""
    if value not in choices:
        raise OptionError(f"{owner}: {name} must be one of {', '.join(map(repr, choices))}, got {_found(value)}")


def scale_of(rank: int, alpha: float | None, rs: bool) -> float:
    """alpha / rank, or alpha / √rank for rank-stabilised adapters (Kalajdzievski, arXiv:2312.03732)."""
    alpha = rank if alpha is None else alpha
    return alpha / (math.sqrt(rank) if rs else rank)
