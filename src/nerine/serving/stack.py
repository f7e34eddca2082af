"""Low-rank adapters of many samples on one linear layer as one pair of batched products.

The factors of all adapters stand above each other, smaller ranks filled up with zeros, strengths and DoRA's gains in
the second factor. They are stacked once for a batch and kept until it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nerine.algorithms import Call
from nerine.ops.precision import same_dtype
from nerine.serving.base_state import State, outside_autograd
from nerine.serving.pieces import Factors
from nerine.serving.routing import Rows

__all__ = ["Lineup", "Stack"]


class Lineup:
    """The samples that have adapters, and which adapter each has; a sample with a sum stands there once for each.

    They stand in the order of the batch where that are all samples, which then need not be picked; else by adapter.
    """

    def __init__(self, spread: Sequence[Rows], total: int) -> None:
        by_adapter = [(row, n) for n, rows in enumerate(spread) for row in rows.rows]
        by_row = sorted(by_adapter)
        pairs = by_row if [row for row, _ in by_row] == list(range(total)) else by_adapter
        self.rows = Rows([row for row, _ in pairs], total)
        numbers = [n for _, n in pairs]
        each, rest = divmod(len(numbers), len(spread))
        is_even = not rest and numbers == [n for n in range(len(spread)) for _ in range(each)]
        self.adapters = len(spread)
        self.order = None if is_even else Rows(numbers, 0)

    def over_adapters(self, t: Tensor) -> Tensor:
        """An activation of the samples `[samples, ..., channels]` as `[stacked, tokens, channels]`."""
        count = self.adapters if self.order is None else t.shape[0]
        return t.reshape(count, -1, t.shape[-1])

    def over_samples(self, t: Tensor) -> Tensor:
        """A stack `[adapters, ...]` with one entry for each sample; itself where samples of one adapter go together."""
        return t if self.order is None else t.index_select(0, self.order.index(t.device))


@dataclass(frozen=True)
class Stack:
    """down `[adapters, rank, in]`, up `[adapters, out, rank]`, and offset `[adapters, 1, out]` where there is DoRA."""

    lineup: Lineup
    down: Tensor
    up: Tensor
    offset: Tensor | None
    state: State | None

    @classmethod
    def of(cls, lineup: Lineup, factors: Sequence[Factors], strengths: Sequence[float], state: State | None) -> Stack:
        """Those factors, each with its strength; `state` is that of the weight, None where that is being trained."""
        if state is None:
            return cls._of(lineup, factors, strengths, state)
        return outside_autograd(lambda: cls._of(lineup, factors, strengths, state))

    @classmethod
    def _of(cls, lineup: Lineup, factors: Sequence[Factors], strengths: Sequence[float], state: State | None) -> Stack:
        rank = max(f.down.shape[0] for f in factors)
        down = torch.stack([functional.pad(f.down, (0, 0, 0, rank - f.down.shape[0])) for f in factors])
        ups = zip(factors, strengths, strict=True)
        up = torch.stack([functional.pad(f.up * (f.factor * s), (0, rank - f.up.shape[1])) for f, s in ups])
        offset = None
        if any(f.offset is not None for f in factors):
            still = torch.zeros_like(up[0, :, 0])
            rows = [still if f.offset is None else f.offset * s for f, s in zip(factors, strengths, strict=True)]
            offset = torch.stack(rows)[:, None]
        return cls(lineup, down, up, offset, state)

    def holds(self, state: State | None) -> bool:
        """Whether it is still right for a weight in that state; without DoRA the weight plays no part."""
        return self.offset is None or (state is not None and state.same(self.state))

    def deviation(self, call: Call) -> Tensor:
        """What is added to the rows of the lineup `[samples, ..., out]`."""
        lineup = self.lineup
        x = lineup.over_adapters(lineup.rows.of(call.x).to(self.down.dtype))
        h = torch.bmm(x, lineup.over_samples(self.down).mT)
        d = torch.bmm(h, lineup.over_samples(self.up).mT)
        if self.offset is not None:
            y = lineup.over_adapters(lineup.rows.of(call.without_bias()))
            d = torch.addcmul(d, same_dtype(y, d), same_dtype(lineup.over_samples(self.offset), d))
        return d.reshape(len(lineup.rows.rows), *call.x.shape[1:-1], -1)
