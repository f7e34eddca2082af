"""Pieces of a file that fit no layout: they are read as the dense difference that they amount to.

saved.weight, saved.bias              a module saved whole (PEFT's modules_to_save): the base is subtracted
lora_bias                             a bias beside a low-rank product (PEFT's lora_bias)
bias_indices, bias_values, bias_size  a sparse matrix beside a low-rank product (LyCORIS's extraction)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nerine.algorithms import Full, Norm, Params, Sandwich
from nerine.errors import FormatError, ShapeError
from nerine.files.checkpoint import Layer, Record
from nerine.files.pieces import Known, Parts, Piece
from nerine.files.recognise import Told, recognise
from nerine.files.reports import LoadRow
from nerine.ops.precision import wide
from nerine.site import Site

__all__ = ["drop_incomplete", "recognise_any"]

SPARSE = ("bias_indices", "bias_values", "bias_size")
BESIDE = frozenset({"lora_bias", *SPARSE})


def drop_incomplete(parts: Parts) -> None:
    """Put sparse parts that lack a piece among what is not used."""
    for pieces in parts.layers.values():
        found = [suffix for suffix in SPARSE if suffix in pieces]
        if 0 < len(found) < len(SPARSE):
            for suffix in found:
                parts.unused[pieces.pop(suffix).key] = f"a sparse part is {', '.join(SPARSE)}, and not all are there"


def recognise_any(told: Told, site: Site | None, pieces: Mapping[str, Piece], known: Known) -> tuple[Layer, LoadRow]:
    """The adapter of one layer, whatever it is made of; see `recognise`."""
    if "saved.weight" in pieces or "saved.bias" in pieces:
        return _saved(told, site, pieces)
    if site is not None and site.kind == "norm":
        names = {"diff": "w_norm", "diff_b": "b_norm"}
        pieces = {names.get(suffix, suffix): piece for suffix, piece in pieces.items()}
    if not BESIDE & set(pieces):
        return recognise(told, site, pieces, known)
    inner = {suffix: piece for suffix, piece in pieces.items() if suffix not in BESIDE}
    layer, row = recognise(replace(told, algorithm=None), site, inner, known)
    if not isinstance(layer.algorithm, Sandwich) or set(layer.algorithm.pieces) != {"delta"}:
        raise FormatError(
            f"{told.file}: {told.path} has a bias or a sparse part beside {row.algorithm}, which is not read"
        )
    shapes = {"diff": layer.site.shape}
    if "lora_bias" in pieces:
        shapes["diff_b"] = (layer.site.shape[0],)
        if (found := pieces["lora_bias"].shape) != shapes["diff_b"]:
            raise ShapeError(f"{told.path}.lora_bias: expected {shapes['diff_b']}, one for each output, got {found}")
    note = "a low-rank part with a bias or a sparse part: read as the dense difference"
    row = replace(row, algorithm="Full", rank=None, scale=1.0, note="; ".join(n for n in (row.note, note) if n))
    whole = replace(
        layer, algorithm=Full(), shapes=shapes, scale=1.0, load=lambda: Params(_summed(told, layer.record(), pieces))
    )
    return whole, row


def _summed(told: Told, record: Record, pieces: Mapping[str, Piece]) -> dict[str, Tensor]:
    params = record.params.filled(wide(t) for t in record.params.tensors.values())
    algorithm = record.algorithm
    assert isinstance(algorithm, Sandwich)
    diff = algorithm.delta(params, record.site.shape) * params.scale
    if all(key in pieces for key in SPARSE):
        flat = diff.reshape(diff.shape[0], -1)
        indices, values = (pieces[key].read() for key in SPARSE[:2])
        rows, columns = _indices(told, indices, values, flat.shape)
        flat = flat.index_put((rows, columns), wide(values).reshape(-1).to(flat), accumulate=True)
        diff = flat.reshape(diff.shape)
    tensors = {"diff": diff}
    if "lora_bias" in pieces:
        tensors["diff_b"] = wide(pieces["lora_bias"].read()).to(diff) * params.scale
    return tensors


def _indices(told: Told, indices: Tensor, values: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Rows and columns, which LyCORIS keeps in 16 bits: larger ones have come round as negative."""
    indices = indices.long()
    if indices.dim() != 2 or indices.shape[0] != 2 or indices.shape[1] != values.numel():
        wanted, found = (2, values.numel()), tuple(indices.shape)
        raise ShapeError(f"{told.path}.bias_indices: expected {wanted}, one pair for each value, got {found}")
    indices = indices % 65536 if max(shape) > 32767 else indices
    rows, columns = indices
    if indices.numel() and (int(indices.min()) < 0 or int(rows.max()) >= shape[0] or int(columns.max()) >= shape[1]):
        raise FormatError(f"{told.file}: {told.path}.bias_indices point outside of the layer's {tuple(shape)}")
    return rows, columns


def _saved(told: Told, site: Site | None, pieces: Mapping[str, Piece]) -> tuple[Layer, LoadRow]:
    """A module saved whole."""
    extra = set(pieces) - {"saved.weight", "saved.bias"}
    if extra:
        raise FormatError(f"{told.file}: {told.path} was saved whole and has {', '.join(sorted(extra))} besides")
    if site is None:
        raise FormatError(f"{told.file}: {told.path} was saved whole; what it changes is known only beside the model")
    native = site.native(torch.empty(site.shape, device="meta")).shape
    wanted = {"saved.weight": tuple(native), "saved.bias": (site.shape[0],)}
    for suffix, piece in pieces.items():
        if piece.shape != wanted[suffix] and math.prod(piece.shape) != math.prod(wanted[suffix]):
            raise ShapeError(f"{told.file}: {piece.key}: expected {wanted[suffix]}, got {piece.shape}")
    is_norm = site.kind == "norm"
    shapes = {"diff": site.shape, "diff_b": (site.shape[0],)}
    names = {"saved.weight": "diff", "saved.bias": "diff_b"}

    def load() -> Params:
        tensors = {}
        for suffix, piece in sorted(pieces.items(), reverse=True):
            t = wide(piece.read())
            tensors[names[suffix]] = site.canonical(t.reshape(native)) if suffix == "saved.weight" else t
        return Params(tensors)

    shapes = {names[suffix]: shapes[names[suffix]] for suffix in sorted(pieces, reverse=True)}
    algorithm = Norm() if is_norm else Full()
    layer = Layer(algorithm, site, shapes, 1.0, load, finish=_difference)
    return layer, LoadRow(told.path, type(algorithm).__name__, None, 1.0, "a module saved whole, less its base")


def _difference(record: Record, weight: Tensor, bias: Tensor | None) -> Record:
    """The difference to the base of a module that was saved whole."""
    tensors = dict(record.params.tensors)
    if "diff" in tensors:
        tensors["diff"] = wide(tensors["diff"]) - wide(weight).reshape(tensors["diff"].shape)
    if "diff_b" in tensors:
        if bias is None:
            raise FormatError("a bias was saved for a layer that has none; the file is for another model")
        tensors["diff_b"] = wide(tensors["diff_b"]) - wide(bias)
    return replace(record, params=Params(tensors))
