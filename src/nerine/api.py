"""Where models and files meet: `save` and `load`. The only file that knows both."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from nerine.algorithms import Algorithm, Params
from nerine.errors import DeviceError, FormatError, OptionError, shown
from nerine.files.checkpoint import Base, Checkpoint, Layer, Record, of_record
from nerine.files.detect import dialect_named
from nerine.files.folder import open_adapter, write
from nerine.files.meta import write_meta
from nerine.files.readers import readers_of
from nerine.files.reading import read_checkpoint
from nerine.files.reports import LoadReport, SaveReport
from nerine.files.rows import rows_in, take
from nerine.files.store import Outgoing, Source
from nerine.files.writing import lay_out
from nerine.model.adapter import Adapter, Noise
from nerine.model.fitting import Fitting, check_name, fit_in
from nerine.model.mount import Mount, Spot, bias_at, original_at, settle, weight_at
from nerine.model.network import Network
from nerine.model.offload import present
from nerine.model.pipeline import HasComponents, as_model
from nerine.model.sharded import at_rest, check_engines, is_split, only_first, whole
from nerine.model.strengths import Strength, check_strengths, strengths_at
from nerine.model.swap import check_can_rest, padded, rest
from nerine.model.targets import every_spot, spot_at
from nerine.ops.precision import is_finite
from nerine.site import Site
from nerine.version import __version__

__all__ = ["load", "save"]

_log = logging.getLogger("nerine")
_DTYPES = (None, torch.float32, torch.float16, torch.bfloat16, torch.float64)


def save(
    network: Network,
    file: str | os.PathLike[str],
    *,
    dialect: str = "lycoris",
    component: str | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    hashes: bool = False,
) -> SaveReport:
    """Write the adapters of `network` to a safetensors file (for `dialect="peft"` a folder), whole or not at all.

    `dialect` says for which programs (see `nerine.files.dialects`); the report says who reads the file exactly,
    approximately or not at all. `component` is the part of a pipeline that the model is ("unet", "text_encoder_2", ...)
    where its layers do not tell. `dtype` casts the tensors (None: as trained; alpha and magnitudes always stay in
    fp32). `metadata` is added to what nerine writes about settings, layers and version; `hashes` adds the two by which
    sd-scripts and A1111 know a file. The same adapters give the same bytes. Where processes hold pieces of the tensors
    (FSDP2, tensor parallel, ZeRO-3) all of them must call this; the first of them writes.

    Raises:
        OptionError: an unknown dialect or dtype, or a network of several names (save `network["name"]`).
        FormatError: two layers would get the same name, the dialect cannot hold an adapter exactly, or the folder does
            not exist.
    """
    chosen = dialect_named(dialect)
    if dtype not in _DTYPES:
        raise OptionError(f"dtype must be torch.float32, float16, bfloat16, float64 or None, got {dtype!r}")
    if len(network.names) != 1:
        raise OptionError(f'a file holds one adapter: save one of {", ".join(network.names)}, as in network["..."]')
    other = dict(metadata or {})
    for key, value in other.items():
        if not isinstance(key, str) or not isinstance(value, str) or key in ("nerine", "format"):
            raise OptionError(f"metadata is text to text and not 'nerine' or 'format', got {key!r}: {value!r}")
    at_rest(network.model)  # what FSDP2 has left whole after a forward must not be handed to others
    sites = {path: spot.site for path, spot in every_spot(network.model).items()} if chosen.naming != "own" else {}
    with present(network.model):
        layers = _layers(network)
        written = lay_out(layers, chosen, sites=sites, dtype=dtype, component=component)
        algorithms = {path: layer.algorithm for path, layer in layers.items()}
        meta = write_meta(algorithms, __version__, {**written.header, **other}, chosen.name)
        held = [
            t for h, _, _, a in network.placed() for t in (*h._parameters.values(), *a.parameters()) if t is not None
        ]
        tensors = written.tensors
        if any(is_split(t) or hasattr(t, "ds_id") for t in held):  # every process must ask for the weights
            tensors = tuple(map(_held, tensors))
        size = only_first(held, lambda: write(file, chosen, tensors, meta, written.config, hashes))
        readers = readers_of(written.layers, chosen)
    return SaveReport(os.fspath(file), dialect, len(layers), len(tensors), size, tuple(_notes(network)), readers)


def _held(outgoing: Outgoing) -> Outgoing:
    """A tensor made now instead of when its turn comes."""
    tensor = outgoing.make()
    return outgoing._replace(make=lambda: tensor)


def _layers(network: Network) -> dict[str, Layer]:
    layers = {}
    for path, holder, mount, _, adapter in network.located():
        settle(holder, mount)
        if adapter.pending == "start":
            raise DeviceError(f"{path}: the base is on meta, so its adapter has no values yet; load its weights first")
        params = _for_file(adapter, original_at(holder, mount).detach())
        layers[path] = of_record(Record(adapter.algorithm, adapter.site, params), _base(holder, mount, params))
    return layers


def _for_file(adapter: Adapter, original: torch.Tensor) -> Params:
    """The tensors of an adapter as a file has them; `original` is the weight under it."""
    with torch.no_grad():
        p = adapter.folded()
        if not adapter.site.experts:
            p = adapter.algorithm.for_file(p.filled(t.to(original.device) for t in p.tensors.values()), original)
    return p.filled(t.detach() for t in p.tensors.values())


def _base(holder: nn.Module, mount: Mount, params: Params) -> Base:
    """What is under a mount, on the device of its adapter, for dialects whose numbers depend on it."""
    device = next(iter(params.tensors.values())).device

    def bias() -> torch.Tensor | None:
        found = bias_at(holder, mount) if mount.original is None else mount.original[1]
        return None if found is None else found.detach().to(device)

    return Base(lambda: original_at(holder, mount).detach().to(device), bias)


def _notes(network: Network) -> list[str]:
    bad = [key for key, t in network.state_dict().items() if not is_finite(whole(t))]
    notes = [f"not finite: {key}" for key in bad]
    if any(adapter.strength != 1 for *_, adapter in network.adapters()):
        notes.append("strengths are not part of the file: it holds the adapter at strength 1")
    for note in notes:
        _log.warning("%s", note)
    return notes


def load(
    model: nn.Module | Network | HasComponents,
    file: str | os.PathLike[str],
    *,
    strength: Strength = 1.0,
    name: str = "default",
    own: bool = True,
    freeze: bool = True,
    strict: bool = False,
    swap: bool = False,
    dialect: str | None = None,
    component: str | None = None,
    allow_pickle: bool = False,
    dtype: torch.dtype | None = None,
    dropout: float = 0.0,
    rank_dropout: float = 0.0,
    module_dropout: float = 0.0,
    algorithms: Sequence[type[Algorithm]] = (),
) -> Network:
    """Put the adapters of a file on `model`, or copy them into a `Network` that is attached already (to resume).

    A pipeline of diffusers is a model as well: its denoisers and text encoders get their adapters together, and its
    layers are called "unet.down_blocks...". `strength` is one number, or numbers by pattern as in
    `Network.set_strength`, {"unet": 0.8, "text_encoder": 0.4}; layers that no pattern matches get 1.
    `file` may be in any dialect; which one is worked out from its keys, or is `dialect`. PEFT's is a folder. Where the
    file has adapters for several parts of a pipeline that this model could be, `component` says which it is ("unet",
    "text_encoder", "text_encoder_2", ...). `dtype` is the number format in which the adapters are kept: fp32 (None) is
    for training, that of the file takes half the memory and is enough for inference and merging. Pickles (.pt, .bin,
    ...) are read only with `allow_pickle`, and then without running anything in them.

    The returned network's `report` says which layers were matched, which keys were not used and why, and which layers
    the file should have had. With `strict` an unused key or missing layer is an error. The other settings are those
    of `attach`; resuming keeps the network's own. With `swap` the file takes the place of the adapter in a `Network`
    whose tensors stay, as compiled models want it: a smaller rank is filled with zeros, and layers that the file lacks
    come to rest. `algorithms` are classes of your own that the file may hold beside those of the registry. Loading
    twice is the same as loading once.

    Raises:
        FormatError: damaged, nothing matched, in no one dialect, or not complete under `strict`.
        ShapeError: a tensor does not fit its layer.
        OptionError: the name is taken. The model is untouched whenever an error is raised.
    """
    if dtype not in _DTYPES:
        raise OptionError(f"dtype must be torch.float32, float16, bfloat16, float64 or None, got {dtype!r}")
    choice = Choice(strict, dialect, component, allow_pickle, tuple(algorithms), swap)
    if isinstance(model, Network):
        return _resume(model, file, choice)
    if swap:
        raise OptionError("load: swap=True exchanges the tensors of a Network; hand over the one that is attached")
    model = as_model(model, "load", ", a Network")
    check_strengths(strength)
    noise = Noise(dropout=dropout, rank_dropout=rank_dropout, module_dropout=module_dropout)
    check_name(model, name)
    check_engines(model)
    report, fittings = _fittings(model, file, choice, dtype, strength)
    network, _ = fit_in(model, fittings, name, own=own, freeze=freeze, noise=noise)
    network.report = report
    return network


def _fittings(
    model: nn.Module, file: str | os.PathLike[str], choice: Choice, dtype: torch.dtype | None, strength: Strength
) -> tuple[LoadReport, list[Fitting]]:
    """The adapters of a file for the layers of `model`, in memory one after the other."""
    with open_adapter(file, allow_pickle=choice.allow_pickle) as source:
        return read_fittings(model, source, choice, dtype, strength)


class Choice(NamedTuple):
    """How a file is to be read."""

    strict: bool = False
    dialect: str | None = None
    component: str | None = None
    allow_pickle: bool = False
    algorithms: tuple[type[Algorithm], ...] = ()
    swap: bool = False


def read_fittings(
    model: nn.Module, source: Source, choice: Choice, dtype: torch.dtype | None = None, strength: Strength = 1.0
) -> tuple[LoadReport, list[Fitting]]:
    """The adapters of an open file for the layers of `model`, for programs that put them on themselves."""
    spots = every_spot(model, rows_in(source.keys))
    checkpoint = _read(source, {path: spot.site for path, spot in spots.items()}, choice)
    _complain(checkpoint.report, choice.strict)
    return place(model, checkpoint, spots, dtype, strength)


def place(
    model: nn.Module,
    checkpoint: Checkpoint,
    spots: Mapping[str, Spot],
    dtype: torch.dtype | None = None,
    strength: Strength = 1.0,
) -> tuple[LoadReport, list[Fitting]]:
    """The layers of a checkpoint brought to those of `model`, whose `every_spot` is `spots`."""
    fittings, notes = [], []
    spots = {path: spot_at(spots, path) for path in checkpoint.layers}
    check_engines(model, [(path, spot.holder) for path, spot in spots.items()])
    wanted = strengths_at(strength, [(path, spot.holder) for path, spot in spots.items()], model)
    with present(model):
        for (path, layer), own in zip(checkpoint.layers.items(), wanted, strict=True):
            record, note = _completed(layer, spots[path], dtype)
            notes += [f"{path}: {note}"] if note else []
            fittings.append(Fitting(spots[path], record.algorithm, record.params, strength=1.0 if own is None else own))
    return replace(checkpoint.report, notes=(*checkpoint.report.notes, *notes)), fittings


def _completed(layer: Layer, spot: Spot, kept: torch.dtype | None = None) -> tuple[Record, str]:
    """A layer in memory, with what its file leaves to be worked out from the weight, placed where a fresh adapter would
    be; a note on what was worked out, or on numbers that are none."""
    record = layer.record()
    notes = [f"not finite: {name}" for name, t in record.params.tensors.items() if not is_finite(t)]
    weight = weight_at(spot.holder, spot).detach()
    if weight.is_meta and layer.finish is not None:
        raise DeviceError(f"{spot.path}: its base is on meta, and the file can be read only beside its weights")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    device = "cpu" if weight.is_meta else weight.device  # on meta the values would be lost
    params = record.params.filled(t.to(device=device, dtype=dtype) for t in record.params.tensors.values())
    record = replace(record, params=params)
    with torch.no_grad():
        if layer.finish is not None:
            bias = bias_at(spot.holder, spot)
            record = layer.finish(record, weight, None if bias is None else bias.detach())
        record = replace(record, params=record.algorithm.from_file(record.params))
        if not (weight.is_meta or record.site.experts):
            params, note = record.algorithm.complete(record.params, weight)
            record = replace(record, params=params)
            notes += [note] if note else []
    if kept is not None:
        record = replace(record, params=record.params.filled(t.to(kept) for t in record.params.tensors.values()))
    return record, "; ".join(notes)


def _read(source: Source, sites: Mapping[str, Site], choice: Choice) -> Checkpoint:
    """The checkpoint of an open file."""
    return read_checkpoint(source, sites, dialect=choice.dialect, component=choice.component, others=choice.algorithms)


def _complain(report: LoadReport, strict: bool) -> None:
    """Say what of a file was not used and which layers it lacks.

    Raises:
        FormatError: there is such, under `strict`.
    """
    if not (report.unmatched or report.missing):
        return
    summary = f"{report.file}: {len(report.unmatched)} keys were not used and {len(report.missing)} layers are missing"
    if strict:
        details = [f"{shown(key)}: {why}" for key, why in report.unmatched.items()]
        details += [f"missing: {shown(p)}" for p in report.missing]
        raise FormatError(f"{summary}. {'; '.join(details[:5])}")
    _log.warning("%s; see the network's report", summary)


def _resume(network: Network, file: str | os.PathLike[str], choice: Choice) -> Network:
    if len(network.names) != 1:
        raise OptionError(f"a file holds one adapter: load into one of {', '.join(network.names)}")
    placed = {
        path: (Spot(path, holder, adapter.site, mount.attr, mount.rows), adapter)
        for path, holder, mount, _, adapter in network.located()
    }
    with open_adapter(file, allow_pickle=choice.allow_pickle) as source, present(network.model):
        report, found = read_params(network.model, placed, source, choice)
    left = [at for path, at in placed.items() if choice.swap and path not in found]
    for spot, adapter in left:
        check_can_rest(adapter, weight_at(spot.holder, spot))
    network.not_merged("load tensors")
    at_rest(network.model)
    for _, adapter in left:
        rest(adapter)
    for path, params in found.items():
        placed[path][1].take(params)
    network.report = report
    return network


def read_params(
    model: nn.Module, placed: Mapping[str, tuple[Spot, Adapter]], source: Source, choice: Choice
) -> tuple[LoadReport, dict[str, Params]]:
    """The tensors of an open file for adapters that exist in `model`, by path of their layers, for `Adapter.take`.

    What the names in the file mean is worked out from the whole model. Where some rows of a layer have adapters of
    their own and the file has one for all of it, each gets its share.

    Raises:
        ShapeError: one of them has other tensors, or another algorithm.
        FormatError: the adapter of a layer does not come apart into those rows.
    """
    sites = {path: spot.site for path, spot in every_spot(model).items()}
    sites.update({path: spot.site for path, (spot, _) in placed.items()})
    parts: dict[str, list[str]] = {}
    for path, (spot, _) in placed.items():
        parts.setdefault(path if spot.rows is None else path.rpartition("[")[0], []).append(path)
    checkpoint = _read(source, sites, choice)
    found: dict[str, Params] = {}
    notes = []
    for path, layer in checkpoint.layers.items():
        for own in parts.get(path, ()) if path not in placed else (path,):
            spot, adapter = placed[own]
            cut = layer if own == path or spot.rows is None else layer.changed(_share(own, spot.rows, adapter))
            record, note = _completed(cut, spot)
            notes += [f"{own}: {note}"] if note else []
            params = adapter.algorithm.from_file(record.params)
            found[own] = padded(adapter, params) if choice.swap else params
            adapter.check_same(record.algorithm, found[own])
    report = checkpoint.report.only({*placed, *parts}, "the network has no adapter there")
    report = replace(report, missing=tuple(path for path in report.missing if path not in found))
    report = report.lacking(tuple(path for path in placed if path not in found))
    _complain(report, choice.strict)
    return replace(report, notes=(*report.notes, *notes)), found


def _share(path: str, rows: tuple[int, int], adapter: Adapter) -> Callable[[Record], Record]:
    """What cuts the adapter of a whole layer down to some rows, and to the ranks that act there."""

    def cut(record: Record) -> Record:
        part = take(record, [rows], path)
        tensors = dict(part.params.tensors)
        if set(tensors) != {"down", "up"} or "up" not in adapter.names:
            return part
        rank, up = adapter.params().tensors["up"].shape[1], tensors["up"].flatten(1)
        acts = torch.ones_like(up[0], dtype=torch.bool) if up.is_meta else up.ne(0).any(0)
        if not up.is_meta and int(acts.sum()) > rank:
            return part
        kept = torch.argsort(acts.int(), descending=True, stable=True)[:rank].sort().values
        ratio = part.params.scale / adapter.scale if adapter.scale else 1.0  # as it was trained, at the scale it had
        tensors = {"down": tensors["down"][kept], "up": tensors["up"][:, kept] * ratio}
        return replace(part, params=Params(tensors, adapter.scale or part.params.scale))

    return cut
