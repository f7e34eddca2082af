"""Who gets what: the entries of a batch, and which rows of an activation belong to which adapter.

Nothing here knows a layer or a tensor of an adapter. A routing is made once for a batch; index tensors and whatever
layers remember for it live as long as it does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from nerine.algorithms import Call
from nerine.errors import OptionError, ShapeError
from nerine.model.adapter import check_strength
from nerine.serving.base_state import outside_autograd

__all__ = ["Entry", "Part", "Repeat", "Routing", "Rows", "Traffic", "Wanted", "parts_of"]

Wanted = str | tuple[str, float] | Mapping[str, float] | None
"""One sample's adapters: a name, a name with a strength, a sum of several, or None for the base."""

Repeat = Literal["tile", "each"] | None
Part = tuple[str, float | None]  # a name and a strength; None is that with which it was added
Entry = tuple[Part, ...]


def parts_of(wanted: object) -> Entry:
    """What is wanted as a sum of parts; those of strength zero are left out.

    Raises:
        OptionError: it is nothing of the kind.
    """
    if wanted is None:
        return ()
    if isinstance(wanted, str):
        return ((wanted, None),)
    if isinstance(wanted, Mapping):
        pairs: list[tuple[object, object]] = list(wanted.items())
    elif isinstance(wanted, tuple) and len(wanted) == 2:
        pairs = [wanted]
    else:
        pairs = [(wanted, None)]
    found: dict[str, float] = {}
    for name, strength in pairs:
        if not isinstance(name, str):
            raise OptionError(
                f'expected a name, ("name", strength), {{"name": strength, ...}} or None for the base, got {wanted!r}'
            )
        check_strength(strength)
        found[name] = float(strength)  # type: ignore[arg-type]
    return tuple((name, strength) for name, strength in found.items() if strength)


class Rows:
    """Some rows of dimension 0: a view where they are evenly spaced, else by index."""

    def __init__(self, rows: Sequence[int], total: int) -> None:
        self.rows = tuple(rows)
        self.is_all = self.rows == tuple(range(total))
        step = self.rows[1] - self.rows[0] if len(self.rows) > 1 else 1
        even = step > 0 and self.rows == tuple(range(self.rows[0], self.rows[0] + step * len(self.rows), step))
        self.slice = slice(self.rows[0], self.rows[-1] + 1, step) if even else None
        self._index: dict[torch.device, Tensor] = {}

    def index(self, device: torch.device) -> Tensor:
        """The rows as a tensor on `device`."""
        if device not in self._index:
            self._index[device] = outside_autograd(lambda: torch.tensor(self.rows, device=device))
        return self._index[device]

    def of(self, t: Tensor) -> Tensor:
        """These rows of `t`."""
        if self.is_all:
            return t
        return t.index_select(0, self.index(t.device)) if self.slice is None else t[self.slice]

    def call(self, call: Call) -> Call:
        """The call as these samples alone would make it."""
        return call if self.is_all else replace(call, x=self.of(call.x), y=self.of(call.y), fresh=False)

    def add(self, total: Tensor, d: Tensor) -> None:
        """Add `d` to these rows of `total`, in place; the same row may be there more than once."""
        if self.slice is None:
            total.index_add_(0, self.index(total.device), d.to(total.dtype))
        else:
            total[self.slice].add_(d)


@dataclass(eq=False)
class Routing:
    """The adapters of all samples (`size` None), or of each sample of a batch of `size`.

    `parts` are the different (name, strength) in it, and `entries` say by number which of them each sample has.
    """

    parts: tuple[Part, ...]
    entries: tuple[tuple[int, ...], ...] = ()
    repeat: Repeat = None
    size: int | None = None
    kept: dict[Any, Any] = field(default_factory=dict)  # what layers have worked out for this routing

    @classmethod
    def uniform(cls, entry: Entry) -> Routing:
        """One sum for everybody."""
        return cls(entry)

    @classmethod
    def of_batch(cls, entries: Sequence[Entry], repeat: Repeat) -> Routing:
        """One sum for each sample."""
        numbers: dict[Part, int] = {}
        for part in (part for entry in entries for part in entry):
            numbers.setdefault(part, len(numbers))
        return cls(tuple(numbers), tuple(tuple(numbers[p] for p in e) for e in entries), repeat, len(entries))

    @property
    def names(self) -> tuple[str, ...]:
        """Each adapter once."""
        return tuple(dict.fromkeys(name for name, _ in self.parts))

    def spread(self, where: str, x: Tensor, dims: int) -> tuple[Rows, ...]:
        """For each part its rows of an activation at the layer `where`, one sample of which has `dims` dimensions.

        Raises:
            ShapeError: dimension 0 is neither as long as the batch nor, where `repeat` says how, a multiple of it.
        """
        assert self.size is not None
        total = x.shape[0] if x.dim() > dims else 0
        key = ("spread", total)
        if key not in self.kept:
            self.kept[key] = self._spread(where, tuple(x.shape), total, self.size)
        found: tuple[Rows, ...] = self.kept[key]
        return found

    def _spread(self, where: str, shape: tuple[int, ...], total: int, size: int) -> tuple[Rows, ...]:
        times, rest = divmod(total, size)
        if rest or not times:
            raise ShapeError(
                f"{where}: the batch has {size} entries, one for each sample, and the input of this layer is {shape}: "
                f"expected {size} samples in dimension 0{' (or a multiple)' if self.repeat else ''}, found "
                f"{total or 'no such dimension'}. Give as many entries as there are samples; an adapter of a layer "
                "that sees all samples at once can only be used for all of them, by shelf.use(...)"
            )
        if times > 1 and self.repeat is None and len(set(self.entries)) > 1:
            raise ShapeError(
                f"{where}: the batch has {size} entries and the input of this layer {times} times as many samples "
                f'({shape}), in an order that only you know: say batch(entries, repeat="tile") for a, b, a, b (as in '
                'classifier-free guidance) or repeat="each" for a, a, b, b'
            )
        entries = [e for e in self.entries for _ in range(times)] if self.repeat == "each" else self.entries * times
        return tuple(Rows([i for i, e in enumerate(entries) if n in e], total) for n in range(len(self.parts)))


class Traffic:
    """Which routing acts now: that of the `batch` that this thread is in, else the one of everybody."""

    def __init__(self) -> None:
        self.everywhere: Routing | None = None
        self._here = threading.local()

    def now(self) -> Routing | None:
        here: Routing | None = getattr(self._here, "routing", None)
        return self.everywhere if here is None else here

    def enter(self, routing: Routing | None) -> Routing | None:
        """Let `routing` act in this thread; gives the one that did before."""
        before: Routing | None = getattr(self._here, "routing", None)
        self._here.routing = routing
        return before

    def all(self) -> Iterable[Routing]:
        """Those that could act now, as far as this thread can see."""
        here: Routing | None = getattr(self._here, "routing", None)
        return [routing for routing in (self.everywhere, here) if routing is not None]
