"""Moving averages of what is trained, which are often better than the last values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from nerine.errors import ShapeError
from nerine.model.network import Network
from nerine.model.sharded import copy_into

__all__ = ["Ema"]


class Ema:
    """Averages of a network's values in fp32, with weight `decay` for the past; less in the first steps, in which the
    past is the start: min(decay, (1 + step)/(10 + step))."""

    def __init__(self, network: Network, decay: float) -> None:
        self.decay = decay
        self._own = dict(network.named_parameters())
        self._averages = {name: p.detach().float().clone() for name, p in self._own.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the values after a step, the first of which is 0."""
        keep = min(self.decay, (1 + step) / (10 + step))
        values = [p.detach().float() for p in self._own.values()]
        torch._foreach_lerp_(list(self._averages.values()), values, 1 - keep)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averages in the network for the length of a `with` block, then its own bits again."""
        before = {name: p.detach().clone() for name, p in self._own.items()}
        try:
            self._put(self._averages)
            yield
        finally:
            self._put(before)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, by the names of `Network.named_parameters`."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the averages.

        Raises:
            ShapeError: they are of another network.
        """
        if state.keys() != self._averages.keys():
            odd = sorted(state.keys() ^ self._averages.keys())
            raise ShapeError(f"the averages are of another network: {len(odd)} names differ, for example {odd[0]}")
        for name, average in self._averages.items():
            copy_into(average, state[name])

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._own.items():
            parameter.copy_(values[name])
