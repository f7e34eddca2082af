"""The base of an adapter as tools see it: weights by layer, read from a checkpoint without any model class.

The layers come from a skeleton (`nerine.model.skeleton`), so that names, presets and parts of a pipeline mean here what
they mean on a live model; the numbers come from the file, one layer at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from nerine.algorithms import Algorithm, DoRA, TLoRA
from nerine.errors import FormatError, UnsupportedBase, shown
from nerine.files.checkpoint import Base, Checkpoint, Layer, Record
from nerine.files.model_file import ModelFile, layer_name, open_model
from nerine.files.reading import read_checkpoint
from nerine.files.rows import rows_in
from nerine.files.store import Source
from nerine.model.layer import bias_name
from nerine.model.mount import Spot
from nerine.model.skeleton import SCALES, is_packed, skeleton
from nerine.model.storage import storage_of
from nerine.model.targets import every_spot, spot_at
from nerine.ops.precision import wide
from nerine.parts import PARTS
from nerine.site import Site

__all__ = ["Weights", "beside", "open_weights", "read_adapter"]


class Weights:
    """The layers of a model file: their sites by path, and the weight and bias of each when they are asked for."""

    def __init__(self, file: ModelFile) -> None:
        self.file = file
        self._keys = {layer_name(key): key for key in file.keys}
        tensors = {name: (file.shape(key), file.dtype(key)) for name, key in self._keys.items()}
        self.model: nn.Module = skeleton(tensors, file.parts & PARTS.keys())
        self._spots = every_spot(self.model)
        self._packed = {name: dtype for name, (_, dtype) in tensors.items() if is_packed(name, dtype)}

    @property
    def packed(self) -> dict[str, torch.dtype]:
        """The layers whose weights are stored in a form that is not read here, and that are left out: by path, the
        number format of what is stored."""
        return {name.rpartition(".")[0]: dtype for name, dtype in self._packed.items()}

    @property
    def sites(self) -> dict[str, Site]:
        return {path: spot.site for path, spot in self._spots.items()}

    def sites_for(self, source: Source) -> dict[str, Site]:
        """The layers, and those rows of them for which an adapter file has names of their own."""
        rows = rows_in(source.keys)
        return {path: spot.site for path, spot in every_spot(self.model, rows).items()} if rows else self.sites

    def spot(self, path: str) -> Spot:
        """Where the layer of that path is, or some rows of one."""
        return spot_at(self._spots, path)

    def key(self, path: str) -> str:
        """The name of a layer's weight in the file, for whoever writes there as well.

        Raises:
            UnsupportedBase: a scale beside it says what its numbers mean, so that no others can take their place.
        """
        spot = self.spot(path)
        scale = self._scale_key(spot)
        if scale is not None:
            raise UnsupportedBase(
                f"{path}: its weight is stored in eight bits with a scale in {shown(scale)}, and nothing is written "
                "over such; take the weights that it was made from, or keep the adapter beside it"
            )
        return self._keys[_weight_name(spot)]

    def _scale_key(self, spot: Spot) -> str | None:
        """The name of the scale of a weight of eight bits, where there is one."""
        name = _weight_name(spot)
        if self.file.dtype(self._keys[name]).itemsize > 1:
            return None
        lead = name[: -len(spot.attr)]
        return next((self._keys[lead + scale] for scale in SCALES if lead + scale in self._keys), None)

    def _stored(self, spot: Spot) -> Tensor:
        """A weight in the layout of its module, in fp32 where a scale tells what its numbers mean."""
        stored = self.file.read(self._keys[_weight_name(spot)])
        scale = self._scale_key(spot)
        if scale is None:
            return stored
        holder = nn.Module()
        holder.register_buffer(scale.rpartition(".")[2], self.file.read(scale))
        storage = storage_of(holder, stored)
        return stored if storage is None else storage.read(holder, stored)

    def bias_key(self, path: str) -> str | None:
        """The name of its bias in the file; None where it has none."""
        spot = self.spot(path)
        holder = _weight_name(spot)[: -len(spot.attr)]
        return self._keys.get(holder + bias_name(spot.attr))

    def weight(self, path: str) -> Tensor:
        """The weight `[out, in, *k]` of a layer, or of some rows of it, in the number format of the file (fp32 where it
        is stored in eight bits with a scale)."""
        spot = self.spot(path)
        found = spot.site.canonical(self._stored(spot))
        return found if spot.rows is None else found[spot.rows[0] : spot.rows[1]]

    def bias(self, path: str) -> Tensor | None:
        """The bias `[out]` of a layer, or of some rows of it."""
        key, spot = self.bias_key(path), self.spot(path)
        if key is None:
            return None
        found = self.file.read(key)
        return found if spot.rows is None else found[spot.rows[0] : spot.rows[1]]

    def base(self, path: str) -> Base:
        """Both, for whoever asks."""
        return Base(lambda: wide(self.weight(path)), lambda: self.bias(path))


def _weight_name(spot: Spot) -> str:
    """The name of a weight in its model: the path of a layer lacks the last word, that of a parameter has it."""
    path = spot.path if spot.rows is None else spot.path.rpartition("[")[0]
    is_parameter = spot.caller is not None and path.rpartition(".")[2] == spot.attr
    return path if is_parameter else f"{path}.{spot.attr}" if path else spot.attr


@contextmanager
def open_weights(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Iterator[Weights]:
    """Open a checkpoint: a file, the index of one in pieces, or a folder of diffusers or transformers.

    Raises:
        FormatError: it is none, a piece of it is missing, or it is damaged.
    """
    with open_model(path, allow_pickle=allow_pickle) as file:
        yield Weights(file)


def read_adapter(
    source: Source,
    base: Weights | None = None,
    *,
    dialect: str | None = None,
    component: str | None = None,
    algorithms: Sequence[type[Algorithm]] = (),
) -> Checkpoint:
    """The adapters of an open file; with `base` those for its layers, complete, and with their weights beside them.

    Raises:
        FormatError: as `nerine.load`, and where a layer is known only beside its weight and there is no base.
    """
    sites: Mapping[str, Site] | None = None if base is None else base.sites_for(source)
    found = read_checkpoint(source, sites, dialect=dialect, component=component, others=algorithms)
    if base is None:
        return found
    return replace(found, layers={path: beside(layer, base.base(path)) for path, layer in found.layers.items()})


def beside(layer: Layer, base: Base) -> Layer:
    """A layer with the base that it is for, and with what its file leaves to be worked out from that."""
    layer = replace(layer, base=base)
    finish = layer.finish
    if finish is None and not _is_bare(layer):
        return layer
    raw = layer

    def finished() -> Record:
        record = raw.record()
        with torch.no_grad():
            if finish is not None:
                record = finish(record, base.weight(), base.bias())
            if record.site.experts:
                return record
            return replace(record, params=record.algorithm.complete(record.params, base.weight())[0])

    found = finished()  # what it becomes is known only beside the weight
    tensors = found.params.tensors
    return replace(
        raw,
        algorithm=found.algorithm,
        shapes={name: tuple(t.shape) for name, t in tensors.items()},
        dtypes={name: t.dtype for name, t in tensors.items()},
        scale=found.params.scale,
        load=lambda: finished().params,
        finish=None,
    )


def _is_bare(layer: Layer) -> bool:
    """Whether the file leaves out what a T-LoRA started with."""
    inner = layer.algorithm.inner if isinstance(layer.algorithm, DoRA) else layer.algorithm
    return isinstance(inner, TLoRA) and "base_q" not in layer.shapes


def no_base(path: str, what: str) -> FormatError:
    """The error where a layer needs a base that was not given."""
    return FormatError(f"{path}: {what} is known only beside the weight of its layer; give the base with --base")
