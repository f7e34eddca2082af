"""One served layer: what is added to its output in a call, by the routing that acts now.

This is the inner loop of serving. What can be decided for a routing is decided in the first call and kept with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nerine.algorithms import Call, DoRA
from nerine.model.mount import Mount, Spot
from nerine.ops.precision import compute_dtype
from nerine.serving.base_state import State, state_of
from nerine.serving.pieces import is_low_rank
from nerine.serving.residence import Residence
from nerine.serving.routing import Routing, Rows, Traffic
from nerine.serving.stack import Lineup, Stack

__all__ = ["ServedLayer"]


class _Plan(NamedTuple):
    """The parts of a routing that have an adapter at a layer, by number: those that go as one product, and others."""

    together: tuple[int, ...]
    apart: tuple[int, ...]
    strengths: Mapping[int, float]
    asks_weight: bool  # whether something is remembered that holds for one state of the weight


class ServedLayer:
    """The layer at `spot`, to which any adapter of a residence may be added."""

    def __init__(self, spot: Spot, traffic: Traffic, residence: Residence) -> None:
        self.spot = spot
        self.path = spot.path
        self.mount: Mount | None = None
        self.traffic = traffic
        self.residence = residence
        self.dims = len(spot.site.kernel) + (0 if spot.site.kind == "embedding" else 1)  # of one sample, at least

    def is_idle(self) -> bool:
        """Whether no adapter is in use anywhere."""
        return self.traffic.now() is None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def serve(self, call: Call) -> Tensor | None:
        """The deviations of all samples `[batch, ...]`; None where nobody has an adapter here."""
        routing = self.traffic.now()
        if routing is None:
            return None
        spread = None if routing.size is None else routing.spread(self.path, call.x, self.dims)
        plan = self._plan(routing)
        if not plan.together and not plan.apart:
            return None
        state = state_of(self.spot.holder, self.mount) if plan.asks_weight and self.mount is not None else None
        if spread is None:
            return self._for_all(routing, plan, call, state)
        return self._for_each(routing, plan, spread, call, state)

    def _plan(self, routing: Routing) -> _Plan:
        found: _Plan | None = routing.kept.get(self.path)
        if found is None:
            found = routing.kept[self.path] = self._planned(routing)
        return found

    def _planned(self, routing: Routing) -> _Plan:
        strengths, products, asks_weight = {}, [], False
        for number, (name, strength) in enumerate(routing.parts):
            held = self.residence.held[name]
            slot = held.slots.get(self.path)
            if slot is not None:
                strengths[number] = (held.strength if strength is None else strength) * slot.share
                is_product = is_low_rank(slot.algorithm, slot.site)
                products += [number] if is_product else []
                asks_weight = asks_weight or not is_product or isinstance(slot.algorithm, DoRA)
        together = products if routing.size is not None and len(products) > 1 else []
        return _Plan(tuple(together), tuple(n for n in strengths if n not in together), strengths, asks_weight)

    def _deviation(self, routing: Routing, plan: _Plan, number: int, call: Call, state: State | None) -> Tensor:
        piece = self.residence.piece(routing.parts[number][0], self.path, call.x.device)
        return piece.deviation(call, state, plan.strengths[number])

    def _for_all(self, routing: Routing, plan: _Plan, call: Call, state: State | None) -> Tensor:
        first, *others = plan.apart
        total = self._deviation(routing, plan, first, call, state)
        for number in others:
            total = total + self._deviation(routing, plan, number, call, state)
        return total

    def _for_each(
        self, routing: Routing, plan: _Plan, spread: tuple[Rows, ...], call: Call, state: State | None
    ) -> Tensor:
        found: list[tuple[Rows, Tensor]] = []
        if plan.together:
            stack = self._stack(routing, plan, spread, call, state)
            found.append((stack.lineup.rows, stack.deviation(call)))
        for number in plan.apart:
            rows = spread[number]
            found.append((rows, self._deviation(routing, plan, number, rows.call(call), state)))
        if len(found) == 1 and found[0][0].is_all:
            return found[0][1]
        total = call.y.new_zeros(call.y.shape)
        for rows, d in found:
            rows.add(total, d)
        return total

    def _stack(self, routing: Routing, plan: _Plan, spread: tuple[Rows, ...], call: Call, state: State | None) -> Stack:
        """The factors of many adapters as one, kept for as long as the routing and the weight stay."""
        x, numbers = call.x, plan.together
        key = (self.path, x.shape[0], x.device, compute_dtype(x))
        stack: Stack | None = routing.kept.get(key)
        if stack is None or not stack.holds(state):
            lineup = routing.kept.get(("lineup", numbers, x.shape[0]))
            if lineup is None:
                lineup = Lineup([spread[n] for n in numbers], x.shape[0])
                routing.kept["lineup", numbers, x.shape[0]] = lineup
            pieces = [self.residence.piece(routing.parts[n][0], self.path, x.device) for n in numbers]
            strengths = [plan.strengths[n] for n in numbers]
            stack = Stack.of(lineup, [piece.factors(call, state) for piece in pieces], strengths, state)
            routing.kept[key] = stack
        return stack
