"""What one adapter adds to the output of one layer, with all that can be worked out before the call worked out.

Any algorithm's `deviation` serves, with a memo of what it works out from tensors that stay: norms, rotations, products
of factors. On linear layers the factors of a low-rank product are kept themselves, with DoRA's gain in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nerine.algorithms import Algorithm, Call, DoRA, LowRank, Params
from nerine.ops.precision import compute_dtype, same_dtype
from nerine.ops.rescale import gain_of
from nerine.serving.base_state import Memory, State, outside_autograd
from nerine.site import Site

__all__ = ["Factors", "Piece", "is_low_rank"]


def is_low_rank(algorithm: Algorithm, site: Site) -> bool:
    """Whether the deviation is a product of two factors on a linear layer, or such a one inside DoRA over the rows."""
    around_rows = isinstance(algorithm, DoRA) and algorithm.axis == "out"
    inner = algorithm.inner if isinstance(algorithm, DoRA) and around_rows else algorithm
    return site.kind == "linear" and isinstance(inner, LowRank)


class Factors(NamedTuple):
    """d = factor·up·(down·x) + offset·(y - bias), with down `[rank, in]`, up `[out, rank]` and offset `[out]`."""

    down: Tensor
    up: Tensor
    factor: float
    offset: Tensor | None = None

    def deviation(self, call: Call, strength: float) -> Tensor:
        """strength·d for a linear layer."""
        h = functional.linear(call.x.to(self.down.dtype), self.down)
        share = self.factor * strength
        d = functional.linear(h if share == 1 else h * share, self.up)
        if self.offset is None:
            return d
        return torch.addcmul(d, same_dtype(call.without_bias(), d), same_dtype(self.offset, d), value=strength)


class Piece:
    """One adapter at one layer, with its tensors where that computes."""

    def __init__(self, algorithm: Algorithm, params: Params, site: Site) -> None:
        self.algorithm = algorithm
        self.params = params
        self.is_low_rank = is_low_rank(algorithm, site)
        self._memos: dict[bool, Memory[dict[str, Any]]] = {}
        self._plain: dict[torch.dtype, Factors] = {}
        self._around: dict[torch.dtype, Memory[Factors]] = {}

    def deviation(self, call: Call, state: State | None, strength: float) -> Tensor:
        """strength·(deviation + shift); `state` is that of the layer's weight."""
        if self.is_low_rank:
            return self.factors(call, state).deviation(call, strength)
        params = self._remembering(state)
        if isinstance(self.algorithm, DoRA) and self.algorithm.axis == "in" and call.site.kind != "embedding":
            d = _around_inputs(self.algorithm, params, call)
        else:
            d = self.algorithm.deviation(params, call)
        shift = self.algorithm.shift(params)
        if shift is not None:
            d = d + same_dtype(call.site.over_channels(shift), d)
        return d if strength == 1 else d * strength

    def _remembering(self, state: State | None) -> Params:
        """The tensors with what algorithms have worked out from them and from a weight in that state; what inference
        mode has made is kept apart, for autograd cannot use it."""
        if state is None:
            return self.params
        memory = self._memos.setdefault(torch.is_inference_mode_enabled(), Memory())
        return self.params._replace(memo=memory.get(state, dict))

    # -- factors -------------------------------------------------------------------------------------------------
    def factors(self, call: Call, state: State | None) -> Factors:
        """The factors in the number format in which the layer computes."""
        dtype = compute_dtype(call.x)
        if not isinstance(self.algorithm, DoRA):
            if dtype not in self._plain:
                self._plain[dtype] = outside_autograd(lambda: _folded(self.algorithm, self.params, dtype))
            return self._plain[dtype]
        dora = self.algorithm
        memory = self._around.setdefault(dtype, Memory())
        return memory.get(state, lambda: self._folded_around(dora, call.weight, state, dtype))

    def _folded_around(
        self, dora: DoRA, weight: Callable[[], Tensor], state: State | None, dtype: torch.dtype
    ) -> Factors:
        """gain·d + (gain - 1)·(y - bias): one product of two factors, and one pass over the output."""
        params = self._remembering(state)
        inner = params.without("magnitude")
        norm = params.once("norm", lambda: dora.inner.row_norm(inner, weight()))
        gain = gain_of(params.tensors["magnitude"].reshape(-1), norm)
        down, up, factor, _ = _folded(dora.inner, inner, gain.dtype)
        return Factors(down.to(dtype), (up * gain[:, None]).to(dtype), factor, (gain - 1).to(dtype))


def _folded(algorithm: Algorithm, params: Params, dtype: torch.dtype) -> Factors:
    """The factors of a plain low-rank product; those that need no change share the memory of the adapter."""
    assert isinstance(algorithm, LowRank)
    up, down = algorithm.factors(Params(params.tensors))
    return Factors(down.flatten(1).to(dtype), up.to(dtype), params.scale)


def _around_inputs(dora: DoRA, params: Params, call: Call) -> Tensor:
    """DoRA over the inputs, W' = V·m/|V|: what the layer and the inner adapter make of the scaled input."""
    inner, site = params.without("magnitude"), call.site
    norm = params.once("column norm", lambda: dora.inner.column_norm(inner, call.weight()))
    gain = gain_of(params.tensors["magnitude"].reshape(-1), norm)
    more = call.x * same_dtype(site.over_channels((gain - 1).repeat(site.groups)), call.x)
    base = site.op(more, call.weight())
    moved = replace(call, x=call.x + more, y=call.y + same_dtype(base, call.y), fresh=False)
    return base + same_dtype(dora.inner.deviation(inner, moved), base)
