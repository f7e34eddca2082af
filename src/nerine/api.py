"""Where models and files meet: `save` and `load`. The only file that knows both."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from nerine.algorithms import Algorithm, Params
from nerine.errors import DeviceError, FormatError, OptionError, nearest
from nerine.files.checkpoint import Checkpoint, Record, SaveReport
from nerine.files.dialects import DIALECTS
from nerine.files.meta import write_meta
from nerine.files.store import Source, open_file, write_file
from nerine.model.adapter import Noise, check_strength
from nerine.model.fitting import Fitting, check_name, fit_in
from nerine.model.mount import original_at, settle, weight_at
from nerine.model.network import Network
from nerine.model.offload import present
from nerine.model.sharded import at_rest, check_engines, only_first, whole
from nerine.model.targets import every_spot
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
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> SaveReport:
    """Write the adapters of `network` to a safetensors file, whole or not at all.

    `dtype` casts the tensors (None: as trained; alpha and magnitudes always stay in fp32). `metadata` is added to
    what nerine writes about settings, layers and version. The same adapters give the same bytes. Where processes hold
    pieces of the tensors (FSDP2, tensor parallel, ZeRO-3) all of them must call this; the first of them writes.

    Raises:
        OptionError: an unknown dialect or dtype, or a network of several names (save `network["name"]`).
        FormatError: two layers would get the same name, or the folder does not exist.
    """
    if dialect not in DIALECTS:
        raise OptionError(f"no dialect is called {dialect!r}. {nearest(dialect, DIALECTS)}")
    if dtype not in _DTYPES:
        raise OptionError(f"dtype must be torch.float32, float16, bfloat16, float64 or None, got {dtype!r}")
    if len(network.names) != 1:
        raise OptionError(f'a file holds one adapter: save one of {", ".join(network.names)}, as in network["..."]')
    other = dict(metadata or {})
    for key, value in other.items():
        if not isinstance(key, str) or not isinstance(value, str) or key in ("nerine", "format"):
            raise OptionError(f"metadata is text to text and not 'nerine' or 'format', got {key!r}: {value!r}")
    with present(network.model):
        records = _records(network)
    tensors = DIALECTS[dialect].write(records, dtype)
    meta = write_meta({path: record.algorithm for path, record in records.items()}, __version__, other)
    held = (t for h, _, _, a in network.placed() for t in (*h._parameters.values(), *a.parameters()) if t is not None)
    size = only_first(held, lambda: write_file(file, tensors, meta))
    return SaveReport(os.fspath(file), dialect, len(records), len(tensors), size, tuple(_notes(network)))


def _records(network: Network) -> dict[str, Record]:
    records = {}
    for holder, mount, _, adapter in network.placed():
        settle(holder, mount)
        if adapter.pending == "start":
            raise DeviceError(
                f"{mount.path}: the base is on meta, so its adapter has no values yet; load its weights first"
            )
        base = original_at(holder, mount).detach()
        with torch.no_grad():
            p = adapter.folded()
            if not adapter.site.experts:
                p = adapter.algorithm.for_file(p.filled(t.to(base.device) for t in p.tensors.values()), base)
        records[mount.path] = Record(adapter.algorithm, adapter.site, p.filled(t.detach() for t in p.tensors.values()))
    return records


def _notes(network: Network) -> list[str]:
    bad = [key for key, t in network.state_dict().items() if not torch.isfinite(whole(t)).all()]
    notes = [f"not finite: {key}" for key in bad]
    if any(adapter.strength != 1 for *_, adapter in network.adapters()):
        notes.append("strengths are not part of the file: it holds the adapter at strength 1")
    for note in notes:
        _log.warning("%s", note)
    return notes


def load(
    model: nn.Module | Network,
    file: str | os.PathLike[str],
    *,
    strength: float = 1.0,
    name: str = "default",
    own: bool = True,
    freeze: bool = True,
    strict: bool = False,
    dropout: float = 0.0,
    rank_dropout: float = 0.0,
    module_dropout: float = 0.0,
    algorithms: Sequence[type[Algorithm]] = (),
) -> Network:
    """Put the adapters of a file on `model`, or copy them into a `Network` that is attached already (to resume).

    The returned network's `report` says which layers were matched, which keys were not used and why, and which layers
    the file should have had. With `strict` an unused key or missing layer is an error. The other settings are those
    of `attach`; resuming keeps the network's own. `algorithms` are classes of your own that the file may hold beside
    those of the registry. Loading twice is the same as loading once.

    Raises:
        FormatError: damaged, nothing matched, or not complete under `strict`.
        ShapeError: a tensor does not fit its layer.
        OptionError: the name is taken. The model is untouched whenever an error is raised.
    """
    if isinstance(model, Network):
        return _resume(model, file, strict, algorithms)
    if not isinstance(model, nn.Module):
        raise OptionError(f"load: expected a torch.nn.Module or a Network, got {type(model).__name__}")
    check_strength(strength)
    noise = Noise(dropout=dropout, rank_dropout=rank_dropout, module_dropout=module_dropout)
    check_name(model, name)
    check_engines(model)
    with open_file(file) as source:
        spots = every_spot(model, _rows_in(source.keys))
        sites = {path: spot.site for path, spot in spots.items()}
        checkpoint = _read(source, sites, strict, algorithms=algorithms)
    check_engines(model, [(path, spots[path].holder) for path in checkpoint.records])
    fittings, notes = [], []
    with present(model):
        for path, record in checkpoint.records.items():
            weight = weight_at(spots[path].holder, spots[path]).detach()
            params, note = _completed(record, weight)
            notes += [f"{path}: {note}"] if note else []
            fittings.append(Fitting(spots[path], record.algorithm, _placed(params, weight), strength=strength))
    network, _ = fit_in(model, fittings, name, own=own, freeze=freeze, noise=noise)
    network.report = replace(checkpoint.report, notes=(*checkpoint.report.notes, *notes))
    return network


def _rows_in(keys: Iterable[str]) -> list[tuple[int, int]]:
    """The row ranges of adapters on some rows of a weight, whose names in a file end in [start:stop]."""
    found = {match.groups() for key in keys for match in re.finditer(r"\[(\d+):(\d+)\]", key)}
    return sorted((int(start), int(stop)) for start, stop in found)


def _completed(record: Record, weight: torch.Tensor) -> tuple[Params, str]:
    """The tensors of a record with what its file leaves to be worked out from the weight."""
    if weight.is_meta or record.site.experts:
        return record.params, ""
    return record.algorithm.complete(record.params, weight)


def _read(
    source: Source,
    sites: Mapping[str, Site],
    strict: bool,
    wanted: Iterable[str] = (),
    algorithms: Sequence[type[Algorithm]] = (),
) -> Checkpoint:
    """The checkpoint of an open file; `wanted` layers that it lacks are reported as missing."""
    checkpoint = DIALECTS["lycoris"].knowing(algorithms).read(source, sites)
    report = checkpoint.report.lacking(tuple(path for path in wanted if path not in checkpoint.records))
    if report.unmatched or report.missing:
        summary = (
            f"{report.file}: {len(report.unmatched)} keys were not used and {len(report.missing)} layers are missing"
        )
        if strict:
            details = [f"{key}: {why}" for key, why in report.unmatched.items()]
            details += [f"missing: {p}" for p in report.missing]
            raise FormatError(f"{summary}. {'; '.join(details[:5])}")
        _log.warning("%s; see the network's report", summary)
    return replace(checkpoint, report=report)


def _placed(params: Params, weight: torch.Tensor) -> Params:
    """Tensors on the device of their layer, in the format in which a fresh adapter would be."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    device = "cpu" if weight.is_meta else weight.device  # on meta the values would be lost
    return params.filled(t.to(device=device, dtype=dtype) for t in params.tensors.values())


def _resume(
    network: Network, file: str | os.PathLike[str], strict: bool, algorithms: Sequence[type[Algorithm]]
) -> Network:
    if len(network.names) != 1:
        raise OptionError(f"a file holds one adapter: load into one of {', '.join(network.names)}")
    placed = {mount.path: (holder, mount, adapter) for holder, mount, _, adapter in network.placed()}
    sites = {path: adapter.site for path, (*_, adapter) in placed.items()}
    with open_file(file) as source:
        checkpoint = _read(source, sites, strict, placed, algorithms)
    found, notes = {}, []
    for path, record in checkpoint.records.items():
        holder, mount, adapter = placed[path]
        params, note = _completed(record, weight_at(holder, mount).detach())
        notes += [f"{path}: {note}"] if note else []
        found[path] = adapter.algorithm.from_file(params)
        adapter.check_same(record.algorithm, found[path])
    network.not_merged("load tensors")
    at_rest(network.model)
    for path, params in found.items():
        placed[path][2].take(params)
    network.report = replace(checkpoint.report, notes=(*checkpoint.report.notes, *notes))
    return network
