"""Shelf: the adapters that a model is served with, and which of them each sample gets.

A shelf attaches nothing. It puts one function on each layer that any of its adapters has, and that function asks the
shelf's routing; so exchanging adapters is one assignment, however many layers there are.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from nerine.algorithms import Algorithm
from nerine.api import Choice, place, read_fittings
from nerine.errors import FormatError, OptionError, ShapeError, TargetError, UnsupportedBase, nearest
from nerine.files.checkpoint import Checkpoint
from nerine.files.folder import open_adapter
from nerine.files.reports import LoadReport
from nerine.model.attach import check_free, serve, stop_serving
from nerine.model.fast_path import keep_from_fast_paths, restore_fast_paths
from nerine.model.fitting import Fitting
from nerine.model.layer import bias_name
from nerine.model.mount import Spot
from nerine.model.network import Network
from nerine.model.offload import Groups
from nerine.model.pipeline import HasComponents, as_model
from nerine.model.sharded import is_split
from nerine.model.strengths import Strength, check_strengths
from nerine.model.targets import every_spot
from nerine.serving.copying import copy_params
from nerine.serving.layer import ServedLayer
from nerine.serving.reports import ShelfReport, ShelfRow
from nerine.serving.residence import Held, Residence, held_of
from nerine.serving.routing import Entry, Repeat, Routing, Traffic, Wanted, parts_of

__all__ = ["Shelf"]

_DTYPES = (None, torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Shelf:
    """Adapters of any algorithm and rank for one model, a module or a pipeline.

    All are kept in memory (pinned, where the model is on a GPU), and at most `resident` of them on the device too: one
    that is used comes there, and the one that was not used for longest leaves. `device` is where they compute; None
    means with their layers.
    """

    def __init__(
        self, model: nn.Module | HasComponents, device: torch.device | str | None = None, resident: int = 16
    ) -> None:
        if isinstance(resident, bool) or not isinstance(resident, int) or resident < 1:
            raise OptionError(
                f"Shelf: resident is how many adapters may be on the device, at least 1; got {resident!r}"
            )
        self.model = as_model(model, "Shelf")
        self._residence = Residence(resident, None if device is None else torch.device(device))
        self._traffic = Traffic()
        self._uses: OrderedDict[Entry, Routing] = OrderedDict()
        self._layers: dict[str, ServedLayer] = {}

    # -- what it holds -------------------------------------------------------------------------------------------
    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order in which they were added."""
        return tuple(self._residence.held)

    def __len__(self) -> int:
        return len(self._residence.held)

    def __contains__(self, name: object) -> bool:
        return name in self._residence.held

    def report(self) -> ShelfReport:
        """What it holds, and what of that is on the device."""
        held = self._residence.held.values()
        return ShelfReport(tuple(map(self._row, held)), len(self._layers), self._residence.limit)

    def _row(self, held: Held) -> ShelfRow:
        kinds = dict.fromkeys(str(slot.algorithm) for slot in held.slots.values())
        shown = ", ".join(list(kinds)[:2]) + (f" and {len(kinds) - 2} more" if len(kinds) > 2 else "")
        is_here = held.name in self._residence.resident
        size = (held.values, held.bytes)
        return ShelfRow(held.name, len(held.slots), shown, *size, held.strength, is_here, held.source)

    def __str__(self) -> str:
        return str(self.report())

    # -- adding and removing -------------------------------------------------------------------------------------
    def add(
        self,
        name: str,
        file: str | os.PathLike[str] | Checkpoint,
        *,
        strength: Strength = 1.0,
        dtype: torch.dtype | None = None,
        strict: bool = False,
        dialect: str | None = None,
        component: str | None = None,
        allow_pickle: bool = False,
        algorithms: Sequence[type[Algorithm]] = (),
    ) -> LoadReport:
        """Read an adapter; what the file may be, and what the settings mean, is as in `nerine.load`.

        `strength` is used where an entry names none; numbers by pattern, {"unet": 0.8, "text_encoder": 0.4}, multiply
        whatever strength an entry has. `dtype` is the format in which it is kept in memory; on the device it computes
        in at least fp32. Adapters may be added while others are in use.

        Raises:
            OptionError: the name is taken, or another shelf serves one of the layers.
            UnsupportedBase: a layer cannot have another adapter for each sample; the message says which.
            FormatError, ShapeError: as in `nerine.load`. The shelf is unchanged whenever an error is raised.
        """
        if not isinstance(name, str) or not name:
            raise OptionError(f"{name!r} cannot be the name of an adapter: use a word, such as 'style'")
        if name in self:
            raise OptionError(
                f"the shelf already has an adapter called {name!r}; remove it first, or choose another name"
            )
        if dtype not in _DTYPES:
            raise OptionError(f"dtype must be torch.float32, float16, bfloat16, float64 or None, got {dtype!r}")
        check_strengths(strength)
        by_pattern = strength if isinstance(strength, Mapping) else 1.0
        choice = Choice(strict, dialect, component, allow_pickle, tuple(algorithms))
        report, fittings = self._read(file, choice, by_pattern)
        for fitting in fittings:
            _check_can_be_served(fitting)
        usual = 1.0 if isinstance(strength, Mapping) else float(strength)
        source = "" if isinstance(file, Checkpoint) else os.fspath(file)
        held = held_of(name, source or report.file, usual, fittings, dtype, self._pins(fittings))
        self._open([fitting.spot for fitting in fittings if fitting.spot.path not in self._layers])
        self._residence.add(held)
        return report

    def _read(
        self, file: str | os.PathLike[str] | Checkpoint, choice: Choice, strength: Strength
    ) -> tuple[LoadReport, list[Fitting]]:
        if not isinstance(file, Checkpoint):
            with open_adapter(file, allow_pickle=choice.allow_pickle) as source:
                return read_fittings(self.model, source, choice, None, strength)
        spots = every_spot(self.model)
        lost = [path for path in file.layers if path.rpartition("[")[0] not in spots and path not in spots]
        if lost:
            raise FormatError(f"the checkpoint has {lost[0]}, and {type(self.model).__name__} has no such layer")
        return place(self.model, file, spots, None, strength)

    def _pins(self, fittings: Sequence[Fitting]) -> bool:
        """Whether memory is pinned, so that copies to the device need not wait."""
        if self._residence.device is not None:
            return self._residence.device.type == "cuda"
        return any(t.device.type == "cuda" for fitting in fittings for t in fitting.params.tensors.values())

    def _open(self, spots: Sequence[Spot]) -> None:
        """Serve these layers from now on: all of them, or none where one cannot be."""
        check_free(list(spots))
        groups = Groups(self.model)
        opened: list[ServedLayer] = []
        try:
            for spot in spots:
                layer = ServedLayer(spot, self._traffic, self._residence)
                layer.mount = serve(spot, layer)
                layer.mount.in_group = groups.in_memory(spot.holder._parameters[spot.attr])
                opened.append(layer)
        except OptionError:
            for layer in opened:
                stop_serving(layer.spot)
            raise
        self._layers.update({layer.path: layer for layer in opened})
        if opened:
            keep_from_fast_paths(self.model)

    def remove(self, name: str) -> None:
        """Forget an adapter; layers that no other has are as before.

        Raises:
            OptionError: it is in use.
            TargetError: there is none of that name.
        """
        self._check_known([name])
        if any(name in routing.names for routing in self._traffic.all()):
            raise OptionError(f"{name!r} is in use: shelf.use(None), or another, before it is removed")
        self._uses.clear()
        slots = self._residence.remove(name).slots
        others = {path for held in self._residence.held.values() for path in held.slots}
        self._close([path for path in slots if path not in others])

    def _close(self, paths: Sequence[str]) -> None:
        for path in paths:
            stop_serving(self._layers.pop(path).spot)
        if paths:
            restore_fast_paths(self.model)

    def detach(self) -> None:
        """Take everything off the model and forget all adapters: its forward and modules are as before."""
        self._traffic.everywhere = None
        self._uses.clear()
        self._close(list(self._layers))
        for name in self.names:
            self._residence.remove(name)

    # -- using ---------------------------------------------------------------------------------------------------
    def use(self, wanted: Wanted) -> None:
        """Give all samples from now on this adapter, at this strength, or this sum of several; None is the base.

        No layer is touched: the next forward finds the other adapter. One that is not on the device goes there now.

        Raises:
            TargetError: there is none of that name.
            OptionError: it is nothing of the kind, or more adapters than may be on the device.
        """
        entry = parts_of(wanted)
        routing = self._uses.pop(entry, None) or Routing.uniform(entry)
        self._prepare(routing)
        self._uses[entry] = routing  # with what its layers know by now, for the next time
        if len(self._uses) > self._residence.limit:
            self._uses.popitem(last=False)
        self._traffic.everywhere = routing if entry else None

    @contextmanager
    def batch(self, entries: Sequence[Wanted], *, repeat: Repeat = None) -> Iterator[None]:
        """Give each sample of the batch its own for the length of a `with` block, in this thread.

        There is one entry for each index of dimension 0 of the input of every layer that the adapters have. Where a
        layer sees a multiple of that, `repeat` says in which order: "tile" is a, b, a, b (the two halves of
        classifier-free guidance), "each" is a, a, b, b (frames or heads beside their sample). A sample without an
        adapter gets the base, bit by bit.

        Raises:
            TargetError, OptionError: as for `use`; an unknown `repeat`, or no entries.
            ShapeError: in the forward, where a layer sees another number of samples.
        """
        if repeat not in ("tile", "each", None):
            raise OptionError(f'repeat must be "tile" (a, b, a, b), "each" (a, a, b, b) or None, got {repeat!r}')
        if isinstance(entries, str | Mapping) or not isinstance(entries, Sequence) or not entries:
            raise OptionError(
                f'batch: expected a list with one entry for each sample, as in ["cat", None, ("dog", 0.5)]; '
                f"got {entries!r}"
            )
        wanted: list[Entry] = [parts_of(one) for one in entries]
        routing = Routing.of_batch(wanted, repeat)
        self._prepare(routing)
        before = self._traffic.enter(routing)
        try:
            yield
        finally:
            self._traffic.enter(before)

    def _prepare(self, routing: Routing) -> None:
        """Have the adapters of a routing on the device."""
        self._check_known(routing.names)
        self._residence.check_room(routing.names)
        self._residence.bring(routing.names)

    def _check_known(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self:
                raise TargetError(f"the shelf has no adapter called {name!r}. {nearest(name, self.names)}")

    def copy_into(self, network: Network, name: str) -> None:
        """Copy an adapter, and its strengths, into the tensors of an attached network, for a model that is compiled.

        No tensor is exchanged, so that nothing is compiled again: smaller ranks are filled with zeros, and layers that
        the adapter lacks come to rest. The network is one of the same algorithm with at least that rank, from
        `nerine.load` or `nerine.attach`, on a model that this shelf may or may not serve.

        Raises:
            TargetError: there is no adapter of that name.
            OptionError, ShapeError, FormatError, MergeError: the network cannot take it; it is as before then.
        """
        self._check_known([name])
        copy_params(self._residence, name, network)


def _check_can_be_served(fitting: Fitting) -> None:
    """Whether samples can have adapters of their own at a layer.

    Raises:
        UnsupportedBase: only its module can use a changed weight, and that for all samples at once.
        ShapeError: the adapter moves a bias, and the layer has none.
    """
    spot, site = fitting.spot, fitting.spot.site
    why = ""
    if site.experts:
        why = "a parameter that holds several experts"
    elif site.kind == "norm":
        why = "a normalisation layer"
    elif spot.rows is not None:
        why = "some rows of a layer"
    elif site.opaque or spot.caller is not None:
        why = "a weight that only its own module can compute with"
    elif is_split(spot.holder._parameters[spot.attr]):
        why = "a weight that is split over processes"
    if why:
        raise UnsupportedBase(
            f"{spot.path}: {fitting.algorithm} on {why} cannot differ from sample to sample. Use nerine.load, which "
            "attaches it for all samples, or serve a file without that layer"
        )
    if bias_name(spot.attr) not in spot.holder._parameters and fitting.algorithm.shift(fitting.params) is not None:
        raise ShapeError(f"{spot.path}: the adapter moves a bias, and this kind of layer has none")
