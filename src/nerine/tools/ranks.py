"""How many ranks a layer keeps, from the singular values of what it adds: a number, a share of the energy, the size of
the file, or one of the dynamic rules of sd-scripts.

Source: `index_sv_*` and `rank_resize` of sd-scripts' networks/resize_lora.py, restated for values alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nerine.errors import OptionError, nearest
from nerine.ops.factored import least_rank

__all__ = ["METHODS", "Choice", "shares"]

ZERO = 1e-6  # a layer whose largest value is no more than this keeps a single rank, as sd-scripts has it


def _sv_ratio(s: Tensor, ratio: float) -> int:
    """As many as are above a part of the largest."""
    return int((s > s[0] / ratio).sum())


def _sv_cumulative(s: Tensor, share: float) -> int:
    """As many as it takes for their sum to reach a share of all."""
    return int(torch.searchsorted(s.cumsum(0) / float(s.sum()), share)) + 1


def _sv_fro(s: Tensor, share: float) -> int:
    """As many as it takes for the norm to reach a share of the whole."""
    squares = s.square()
    return int(torch.searchsorted(squares.cumsum(0) / float(squares.sum()), share**2)) + 1


METHODS: Mapping[str, Callable[[Tensor, float], int]] = {
    "sv_ratio": _sv_ratio,
    "sv_cumulative": _sv_cumulative,
    "sv_fro": _sv_fro,
}


@dataclass(frozen=True)
class Choice:
    """What decides: `rank` (or `conv_rank` where there is a kernel) alone or as the most there may be; `energy`, the
    share of Σσ² to keep; `method` with its `param`; or `size`, the bytes of the whole file.

    Raises `OptionError` where none or several of them are given, or a value is out of range.
    """

    rank: int | None = None
    conv_rank: int | None = None
    energy: float | None = None
    size: int | None = None
    method: str | None = None
    param: float | None = None

    def __post_init__(self) -> None:
        rules = [name for name in ("energy", "size", "method") if getattr(self, name) is not None]
        if len(rules) > 1 or not (rules or self.rank or self.conv_rank):
            raise OptionError(
                f"resize: expected a rank, or one of energy, size and method, got {' and '.join(rules) or 'none'}"
            )
        for name in ("rank", "conv_rank", "size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise OptionError(f"resize: {name} must be a whole number of at least 1, got {value!r}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise OptionError(f"resize: energy is a share from 0 to 1 (0.95 keeps 95 % of Σσ²), got {self.energy!r}")
        if self.method is not None and self.method not in METHODS:
            raise OptionError(f"resize: no method is called {self.method!r}. {nearest(self.method, METHODS)}")
        if (self.method is None) != (self.param is None):
            raise OptionError("resize: a method and its param go together, as in --method sv_ratio --param 20")
        if self.param is not None and not (math.isfinite(self.param) and self.param > 0):
            raise OptionError(f"resize: param must be a number above 0, got {self.param!r}")

    @property
    def by_rank(self) -> bool:
        """Whether a number alone decides."""
        return self.energy is None and self.size is None and self.method is None

    @property
    def is_dynamic(self) -> bool:
        """Whether it is one of sd-scripts' rules."""
        return self.method is not None

    def most(self, has_kernel: bool, there: int) -> int:
        """The largest rank that a layer may keep of those that are there."""
        cap = self.conv_rank if has_kernel and self.conv_rank is not None else self.rank
        return there if cap is None else min(cap, there)

    def keep(self, s: Tensor, side: int, has_kernel: bool) -> int:
        """How many of the values `s` to keep, of a matrix whose smaller side is `side`."""
        most = self.most(has_kernel, len(s))
        if self.energy is not None:
            return min(most, least_rank(s, math.sqrt(max(0.0, 1 - self.energy))))
        if self.method is not None and self.param is not None:
            if float(s[0]) <= ZERO:
                return 1
            index = METHODS[self.method](s, self.param)
            return min(most, max(1, min(index, side - 1)) + 1)  # one more than the rule says, as sd-scripts has it
        return most


def shares(squares: Sequence[Tensor], units: Sequence[int], most: Sequence[int], room: int) -> list[int]:
    """How many ranks each layer keeps so that the squares that are left out are least: one rank of layer i takes
    `units[i]` bytes, and all take no more than `room`. Each keeps one at least, and no more than `most`.

    Values fall within a layer, so the best gains for their bytes, over all layers, are a beginning of each.
    """
    kept = [1] * len(squares)
    left = room - sum(units)
    gains = torch.cat([s[1:m] / unit for s, unit, m in zip(squares, units, most, strict=True)])
    owners = torch.cat([torch.full((max(m - 1, 0),), i) for i, m in enumerate(most)])
    for at in torch.sort(gains, descending=True, stable=True).indices.tolist():
        owner = int(owners[at])
        if units[owner] <= left:
            kept[owner] += 1
            left -= units[owner]
    return kept
