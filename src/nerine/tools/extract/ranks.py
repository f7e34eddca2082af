"""How large an adapter is to be: a rank, or what decides about the rank of each layer by its singular values.

LyCORIS's five modes have their names and rules here, so that a setting found there gives the same ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nerine.errors import OptionError, nearest
from nerine.site import Site

__all__ = ["MODES", "Wanted", "check_wanted", "rank_for", "wanted_of"]

MODES = ("fixed", "threshold", "ratio", "quantile", "full")
_EXPECTED = {
    "rank": "a whole number of at least 1",
    "energy": "a share of the squares, above 0 and up to 1",
    "threshold": "a number of at least 0",
    "ratio": "a number from 0 to 1",
    "quantile": "a number from 0 to 1",
    "size": "a number of bytes above 0",
}


@dataclass(frozen=True)
class Wanted:
    """What was asked for: "rank", "energy", "threshold", "ratio", "quantile", "full" or "size", and its number; the
    number for convolutions of more than one tap where it is another. `as_lycoris`: a product that is no smaller than
    the difference itself gives way to that."""

    kind: str
    value: float = 0.0
    on_conv: float | None = None
    as_lycoris: bool = False

    def at(self, site: Site) -> float:
        """The number for a layer."""
        return self.value if site.pointwise or self.on_conv is None else self.on_conv

    @property
    def counts(self) -> bool:
        """Whether singular values decide about the rank of each layer."""
        return self.kind in ("energy", "threshold", "ratio", "quantile")

    def __str__(self) -> str:
        if self.kind == "size":
            return f"{int(self.value):,} bytes"
        shown = "" if self.kind == "full" else f" {self.value:g}"
        return f"{self.kind}{shown}" + (f" ({self.on_conv:g} on convolutions)" if self.on_conv is not None else "")


def wanted_of(
    *,
    rank: int | None = None,
    energy: float | None = None,
    threshold: float | None = None,
    ratio: float | None = None,
    quantile: float | None = None,
    size: int | None = None,
    mode: str | None = None,
    param: float | None = None,
    conv_rank: int | None = None,
) -> Wanted | None:
    """The one that was given; None where none was.

    Raises:
        OptionError: there are two of them, an unknown mode, or a number that it cannot be.
    """
    plain = {"rank": rank, "energy": energy, "threshold": threshold, "ratio": ratio, "quantile": quantile, "size": size}
    given = {name: value for name, value in plain.items() if value is not None}
    if mode is not None:
        given["mode"] = 0 if param is None else param
    if len(given) > 1:
        raise OptionError(
            f"extract: one of {', '.join([*plain, 'mode'])} says how large it is to be; got {_and(given)}"
        )
    if param is not None and mode is None:
        raise OptionError(f"extract: param belongs to a mode; say which with mode={_or(MODES)}")
    if not given:
        if conv_rank is not None:
            raise OptionError("extract: conv_rank goes with rank, which is for all other layers")
        return None
    ((kind, value),) = given.items()
    if mode is not None:
        if mode not in MODES:
            raise OptionError(f"extract: there is no mode {mode!r}. {nearest(mode, MODES)}")
        if param is None and mode != "full":
            raise OptionError(f"extract: mode {mode!r} needs param={_EXPECTED[_plain(mode)]}")
        kind = _plain(mode)
    if conv_rank is not None and kind != "rank":
        raise OptionError("extract: conv_rank goes with rank, which is for all other layers")
    found = Wanted(kind, value, conv_rank, mode is not None or kind in ("threshold", "ratio", "quantile"))
    check_wanted(found)
    return found


def check_wanted(wanted: Wanted) -> None:
    """Whether the number is one that such a thing can be.

    Raises:
        OptionError: it is not.
    """
    for value in (wanted.value, *([] if wanted.on_conv is None else [wanted.on_conv])):
        whole = isinstance(value, int | float) and not isinstance(value, bool) and value == int(value)
        right = {
            "rank": whole and value >= (0 if wanted.as_lycoris else 1),
            "size": whole and value > 0,
            "energy": 0 < value <= 1,
            "threshold": value >= 0,
            "full": True,
        }.get(wanted.kind, 0 <= value <= 1)
        if not right:
            raise OptionError(f"extract: {wanted.kind} must be {_EXPECTED[wanted.kind]}, got {value!r}")


def rank_for(wanted: Wanted, site: Site, s: Tensor | None, must: bool = False) -> int | None:
    """The rank of a layer; None where the difference itself is to be kept, unless it `must` be a product. `s` are all
    of its singular values, largest first, for what counts them.

    "threshold": how many are above it; "ratio": above that part of the largest; "quantile": how many it takes for that
    part of their sum; "energy": for that part of the sum of their squares. At least one, at most all.
    """
    most = min(site.shape[0], site.flat)
    if wanted.kind == "full":
        return most if must else None
    value = wanted.at(site)
    if wanted.kind == "rank":
        found = int(value)
    else:
        assert s is not None, f"{wanted.kind} counts singular values"
        found = _counted(wanted.kind, value, s)
    if not wanted.as_lycoris or must:
        return min(most, max(1, found))
    found = min(site.shape[0], site.shape[1], max(1, found))
    return None if found >= site.shape[0] / 2 else found


def _counted(kind: str, value: float, s: Tensor) -> int:
    if kind == "threshold":
        return int((s > value).sum())
    if kind == "ratio":
        return int((s > s[0] * value).sum())
    shares = s if kind == "quantile" else s.to(torch.float64).square()
    # one more than those whose sum is still short of it; rounding must not ask for one that adds nothing
    short = shares.cumsum(0) < value * shares.sum() * (1 - torch.finfo(torch.float32).eps * len(s))
    return min(int(short.sum()) + 1, len(s))


def _plain(mode: str) -> str:
    return "rank" if mode == "fixed" else mode


def _and(given: Mapping[str, object]) -> str:
    return " and ".join(f"{name}={value!r}" for name, value in given.items())


def _or(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))
