"""A file written again with its tensors as they are, bit by bit, and other metadata: the hashes in it are made anew."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch

from nerine.algorithms import Algorithm
from nerine.errors import NerineError
from nerine.files.atomic import replacing_folder, write_json
from nerine.files.folder import CONFIG
from nerine.files.hashes import PLACEHOLDERS
from nerine.files.header import Entry, place, render_header
from nerine.files.reading import read_checkpoint
from nerine.files.store import Outgoing, Source, write_file

__all__ = ["HASHES", "as_they_are", "differences", "size_of", "write_verbatim"]

HASHES = (*PLACEHOLDERS, "modelspec.hash_sha256")


def as_they_are(source: Source, keys: Collection[str] | None = None) -> list[Outgoing]:
    """The tensors of an open file, to be written as they are."""

    def of(key: str) -> Callable[[], torch.Tensor]:
        return lambda: source.read(key)

    return [Outgoing(k, source.shape(k), source.dtype(k), of(k)) for k in (source.keys if keys is None else keys)]


def write_verbatim(
    source: Source,
    target: Path,
    metadata: Mapping[str, str],
    tensors: Sequence[Outgoing],
    *,
    is_folder: bool = False,
) -> int:
    """Write `tensors` with `metadata`, of which hashes that are there are worked out anew; the number of bytes.

    With `is_folder`, the target is a folder that also gets the settings which stand beside the tensors of `source`.
    """
    told = dict(metadata)
    if "modelspec.hash_sha256" in told:
        lead = "0x" if told["modelspec.hash_sha256"].startswith("0x") else ""
        told["modelspec.hash_sha256"] = lead + _data_hash(tensors, target)
    hashes = _has_hashes(told)
    if not is_folder:
        return write_file(target, tensors, told, hashes=hashes)
    with replacing_folder(target) as folder:
        size = write_file(folder / source.path.name, tensors, told, hashes=hashes)
        return size + (write_json(folder / CONFIG, dict(source.config)) if source.config else 0)


def size_of(tensors: Sequence[Outgoing], metadata: Mapping[str, str]) -> int:
    """The bytes of a file of these."""
    entries = place(((o.key, tuple(o.shape), o.dtype) for o in tensors), "")
    told = {**metadata, **(PLACEHOLDERS if _has_hashes(metadata) else {})}
    return len(render_header(entries, told, "")) + max((entry.end for entry in entries.values()), default=0)


def _has_hashes(metadata: Mapping[str, str]) -> bool:
    """Whether there are hashes as sd-scripts takes them. Those that LyCORIS writes ("0x...") are of the tensors one by
    one, which stay as they are."""
    found = [metadata[key] for key in PLACEHOLDERS if key in metadata]
    return bool(found) and not any(value.startswith("0x") for value in found)


def _data_hash(tensors: Sequence[Outgoing], where: object) -> str:
    """The SHA-256 of the data, in the order in which it will stand in the file."""
    makers = {o.key: o.make for o in tensors}
    found = hashlib.sha256()
    for key in place(((o.key, tuple(o.shape), o.dtype) for o in tensors), where):
        found.update(makers[key]().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def differences(source: Source, metadata: Mapping[str, str]) -> tuple[str, ...]:
    """What would be read otherwise with `metadata` in place of the file's own: a few words a difference."""
    before, after = _reading(source, source.metadata), _reading(source, metadata)
    if isinstance(after, str):
        return () if isinstance(before, str) else (f"the file could not be read any more: {after}",)
    if isinstance(before, str):
        return ()
    scales = [key for key in before if before[key][1] != after.get(key, before[key])[1]]
    kinds = [key for key in before if before[key][0] is not after.get(key, before[key])[0]]
    found = [f"{len(scales)} tensors would be read at another scale (first {scales[0]})"] if scales else []
    found += [f"{len(kinds)} tensors would be read as another algorithm (first {kinds[0]})"] if kinds else []
    return tuple(found)


def _reading(source: Source, metadata: Mapping[str, str]) -> dict[str, tuple[type[Algorithm], float]] | str:
    """{key: algorithm and scale of its layer}; or why it cannot be read."""
    entries = {key: Entry(source.dtype(key), source.shape(key), 0, source.nbytes(key)) for key in source.keys}
    again = Source(source.path, entries, metadata, source.read, source.ignored)
    again.config = source.config
    try:
        read = read_checkpoint(again)
    except NerineError as error:
        return str(error)
    layers = {key: read.layers[path] for key, path in read.report.used.items() if path in read.layers}
    return {key: (type(layer.algorithm), layer.scale) for key, layer in layers.items()}
