"""Where models and files meet: `save` and `load`. The only file that knows both."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from nerine.algorithms import Params
from nerine.errors import FormatError, OptionError, UnsupportedBase, nearest
from nerine.files.checkpoint import Checkpoint, Record, SaveReport
from nerine.files.dialects import DIALECTS
from nerine.files.meta import write_meta
from nerine.files.store import open_file, write_file
from nerine.model.adapter import Noise, check_strength
from nerine.model.attach import mount_of
from nerine.model.layer import is_layer, site_of, weight_of
from nerine.model.network import Fitting, Network, check_name, fit_in
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
    what nerine writes about settings, layers and version. The same adapters give the same bytes.

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
    records = _records(network)
    tensors = DIALECTS[dialect].write(records, dtype)
    meta = write_meta({path: record.algorithm for path, record in records.items()}, __version__, other)
    size = write_file(file, tensors, meta)
    return SaveReport(os.fspath(file), dialect, len(records), len(tensors), size, tuple(_notes(network)))


def _records(network: Network) -> dict[str, Record]:
    modules = dict(network.model.named_modules())
    records = {}
    for path, _, adapter in network.adapters():
        layer, mount = modules[path], mount_of(modules[path])
        base = mount.original if mount is not None and mount.original is not None else weight_of(layer)
        with torch.no_grad():
            folded = adapter.folded()
            params = adapter.algorithm.for_file(folded, base.detach())
        records[path] = Record(
            adapter.algorithm, Params({k: t.detach() for k, t in params.tensors.items()}, params.scale)
        )
    return records


def _notes(network: Network) -> list[str]:
    bad = [key for key, t in network.state_dict().items() if not torch.isfinite(t).all()]
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
) -> Network:
    """Put the adapters of a file on `model`, or copy them into a `Network` that is attached already (to resume).

    The returned network's `report` says which layers were matched, which keys were not used and why, and which layers
    the file should have had. With `strict` an unused key or missing layer is an error. The other settings are those
    of `attach`; resuming keeps the network's own. Loading twice is the same as loading once.

    Raises:
        FormatError: damaged, nothing matched, or not complete under `strict`.
        ShapeError: a tensor does not fit its layer.
        OptionError: the name is taken. The model is untouched whenever an error is raised.
    """
    if isinstance(model, Network):
        return _resume(model, file, strict)
    if not isinstance(model, nn.Module):
        raise OptionError(f"load: expected a torch.nn.Module or a Network, got {type(model).__name__}")
    check_strength(strength)
    noise = Noise(dropout=dropout, rank_dropout=rank_dropout, module_dropout=module_dropout)
    check_name(model, name)
    layers, sites = _sites(model)
    checkpoint = _read(file, sites, strict)
    fittings = [
        Fitting(path, layers[path], sites[path], r.algorithm, _placed(r.params, layers[path]), strength=strength)
        for path, r in checkpoint.records.items()
    ]
    network, _ = fit_in(model, fittings, name, own=own, freeze=freeze, noise=noise)
    network.report = checkpoint.report
    return network


def _sites(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, Site]]:
    layers, sites = {}, {}
    for path, module in model.named_modules():
        if is_layer(module):
            try:
                sites[path] = site_of(module, path)
            except UnsupportedBase as error:
                _log.info("%s", error)
                continue
            layers[path] = module
    return layers, sites


def _read(
    file: str | os.PathLike[str], sites: Mapping[str, Site], strict: bool, wanted: Iterable[str] = ()
) -> Checkpoint:
    """The checkpoint of a file; `wanted` layers that it lacks are reported as missing."""
    with open_file(file) as source:
        checkpoint = DIALECTS["lycoris"].read(source, sites)
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


def _placed(params: Params, layer: nn.Module) -> Params:
    """Tensors on the device of their layer, in the format in which a fresh adapter would be."""
    weight = weight_of(layer)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return Params({name: t.to(device=weight.device, dtype=dtype) for name, t in params.tensors.items()}, params.scale)


def _resume(network: Network, file: str | os.PathLike[str], strict: bool) -> Network:
    if len(network.names) != 1:
        raise OptionError(f"a file holds one adapter: load into one of {', '.join(network.names)}")
    adapters = {path: adapter for path, _, adapter in network.adapters()}
    checkpoint = _read(file, {path: adapter.site for path, adapter in adapters.items()}, strict, adapters)
    for path, record in checkpoint.records.items():
        adapters[path].check_same(record.algorithm, record.params)
    network.not_merged("load tensors")
    for path, record in checkpoint.records.items():
        adapters[path].take(record.params)
    network.report = checkpoint.report
    return network
