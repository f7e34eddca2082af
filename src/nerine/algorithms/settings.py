"""Checks of settings that several algorithms share; each returns nothing and raises `OptionError` in words."""

from __future__ import annotations

import math

from nerine.errors import OptionError

__all__ = [
    "check_alpha",
    "check_choice",
    "check_flag",
    "check_number",
    "check_rank",
    "nearest_butterfly",
    "nearest_divisor",
    "scale_of",
]


def _found(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"


def check_rank(owner: str, rank: object, name: str = "rank") -> None:
    """A rank (or another size called `name`) is a whole number of at least one."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise OptionError(f"{owner}: {name} must be a whole number of at least 1, got {_found(rank)}")


def check_number(owner: str, name: str, value: object) -> None:
    """A finite number of at least zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise OptionError(f"{owner}: {name} must be a number of at least 0, got {_found(value)}")


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


def _nearest(sizes: list[int], wanted: int) -> int:
    """The size nearest to `wanted`, the smaller of two; 1 where none is within reach (four times, at least 64)."""
    near = [size for size in sizes if 1 < size <= max(4 * wanted, 64)]
    return min(near, key=lambda size: (abs(size - wanted), size), default=1)


def nearest_divisor(total: int, wanted: int) -> int:
    """The size of equal blocks of `total` channels that is nearest to `wanted`; 1 where there is none."""
    return _nearest([d for d in range(2, min(total, max(4 * wanted, 64)) + 1) if total % d == 0], wanted)


def nearest_butterfly(total: int, wanted: int) -> int:
    """The same where the number of blocks is a power of two, and their size even if there are several."""
    sizes = [total >> j for j in range(total.bit_length()) if total % (1 << j) == 0]
    return _nearest([size for size in sizes if size % 2 == 0 or size == total], wanted)
