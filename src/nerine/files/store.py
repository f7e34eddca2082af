"""Safetensors in and out, one tensor at a time: what is read lies in memory of its own, what is written has the same
bytes for the same content. Pickles only for those who ask for it.

Source: the safetensors format, https://github.com/huggingface/safetensors (8-byte length, JSON header, data).
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from nerine.errors import FormatError, shown
from nerine.files.atomic import replacing, write_json
from nerine.files.hashes import PLACEHOLDERS, Hashes
from nerine.files.header import Entry, Header, place, read_header, render_header
from nerine.files.pickles import SUFFIXES, is_pickle, is_safetensors, read_pickle

__all__ = ["Outgoing", "Source", "open_file", "write_file", "write_json"]


class Outgoing(NamedTuple):
    """A tensor to write: announced by its name, shape and format, and made when its turn comes."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


class Source:
    """Named tensors and metadata of an open file, or of memory; a tensor is read when it is asked for.

    `ignored` says which entries of a pickle were left out, and why: {name: reason}. `config` are settings that stand in
    a file beside it, for formats that have such a file.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, Entry],
        metadata: Mapping[str, str],
        reader: Callable[[str], Tensor],
        ignored: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.keys: tuple[str, ...] = tuple(sorted(entries))
        self.metadata: Mapping[str, str] = dict(metadata)
        self.ignored: Mapping[str, str] = dict(ignored or {})
        self.config: Mapping[str, Any] = {}
        self._entries = entries
        self._reader = reader

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str] | None = None,
        path: str | os.PathLike[str] = "(memory)",
        ignored: Mapping[str, str] | None = None,
    ) -> Source:
        """Tensors in memory, as if they were the file `path`; what is read is a copy on the CPU."""
        entries = {key: Entry(t.dtype, tuple(t.shape), 0, t.numel() * t.element_size()) for key, t in tensors.items()}

        def read(key: str) -> Tensor:
            if tensors[key].is_meta:
                raise FormatError(
                    f"{os.fspath(path)}: {shown(key)} is on meta and has no values; give tensors that have"
                )
            return tensors[key].detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

        return cls(Path(path), entries, metadata or {}, read, ignored)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._entry(key).shape

    def dtype(self, key: str) -> torch.dtype:
        return self._entry(key).dtype

    def nbytes(self, key: str) -> int:
        entry = self._entry(key)
        return entry.end - entry.begin

    def read(self, key: str) -> Tensor:
        """One tensor on the CPU, in memory of its own: what happens to the file later does not change it.

        Raises:
            FormatError: there is no such tensor, its bytes cannot be read, or the file has changed since it was opened.
        """
        self._entry(key)
        return self._reader(key)

    def _entry(self, key: str) -> Entry:
        if key not in self._entries:
            raise FormatError(f"{self.path}: has no tensor {shown(key)}")
        return self._entries[key]


# -- reading -----------------------------------------------------------------------------------------------------------
@contextmanager
def open_file(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Iterator[Source]:
    """Open a safetensors file for reading, or with `allow_pickle` a file of PyTorch's, of which tensors are read alone.

    Raises:
        FormatError: there is no such file, it is a pickle that was not allowed, or it is truncated or damaged.
    """
    file = Path(path)
    if not file.is_file():
        found = "a folder" if file.is_dir() else "something else" if os.path.lexists(file) else "nothing"
        raise FormatError(f"{file}: expected an adapter file, found {found} there")
    _check_byte_order(file)
    try:
        stream = open(file, "rb", buffering=0)  # noqa: SIM115 (closed below; what the caller does is not in this try)
    except OSError as error:
        raise FormatError(f"{file}: cannot be opened ({error.strerror})") from error
    with stream:
        yield _source(file, stream, allow_pickle)


def _source(file: Path, stream: BinaryIO, allow_pickle: bool) -> Source:
    head = _head(stream, file)
    by_name = file.suffix.lower() in SUFFIXES
    if (by_name or is_pickle(head)) and not allow_pickle:
        raise FormatError(
            f"{file}: a pickle can run code when it is opened; "
            "convert it to .safetensors with the program that wrote it, or allow pickles if you trust it"
        )
    if is_pickle(head) or (by_name and not is_safetensors(head)):
        pickled = read_pickle(file)
        return Source.of(pickled.tensors, pickled.metadata, file, pickled.ignored)
    reader = _Reader(file, stream)
    return Source(file, reader.header.entries, reader.header.metadata, reader)


def _head(stream: BinaryIO, file: Path) -> bytes:
    try:
        head = stream.read(9)
        stream.seek(0)
    except OSError as error:
        raise FormatError(f"{file}: cannot be read ({error.strerror})") from error
    return head


class _Reader:
    """Reads tensors of an open safetensors file into fresh memory. No mapping of the file into memory: a file that
    another program cuts short would then end this one, and one that it writes into would change the adapter."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self._path = path
        self._stream = stream
        self._turn = threading.Lock()  # an open file has one position
        try:
            self._state = self._now()
            self.header: Header = read_header(stream, self._state[0], path)
        except OSError as error:
            raise FormatError(f"{path}: cannot be read ({error.strerror})") from error

    def __call__(self, key: str) -> Tensor:
        dtype, shape, begin, _ = self.header.entries[key]
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        raw = tensor.reshape(-1).view(torch.uint8)
        try:
            with self._turn:
                whole = self._fill(raw.numpy().data, self.header.start + begin)
                whole = whole and self._now() == self._state
        except OSError as error:
            raise FormatError(f"{self._path}: {shown(key)} cannot be read ({error.strerror})") from error
        if not whole:
            raise FormatError(
                f"{self._path}: it was changed while it was open, so {shown(key)} cannot be read; load it again"
            )
        if dtype is torch.bool:
            raw.clamp_(max=1)  # a byte that is neither 0 nor 1 would be neither true nor false
        return tensor

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._stream.fileno())
        return status.st_size, status.st_mtime_ns

    def _fill(self, memory: memoryview, at: int) -> bool:
        """Read until `memory` is full; False where the file ends before."""
        self._stream.seek(at)
        done = 0
        while done < len(memory):
            count = self._stream.readinto(memory[done:])  # type: ignore[attr-defined]
            if not count:
                return False
            done += count
        return True


# -- writing -----------------------------------------------------------------------------------------------------------
def write_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor] | Iterable[Outgoing],
    metadata: Mapping[str, str],
    *,
    hashes: bool = False,
) -> int:
    """Write `tensors` and return the number of bytes; the same content gives the same bytes.

    Tensors that are only announced are made one after the other, so that memory for one of them is enough. With
    `hashes` the metadata also gets the two hashes by which other programs recognise the file, in place of those that
    it may have. The file appears under its name only once it is complete and on the disk; an interruption or a full
    disk leaves whatever was there before, and no rubbish.

    Raises:
        FormatError: the folder does not exist, two tensors have the same name, metadata is not text to text, a
            tensor has a format that the file cannot hold, or is not what was announced.
    """
    file = Path(path)
    _check_byte_order(file)
    outgoing = list(_announced(tensors) if isinstance(tensors, Mapping) else tensors)
    entries = place(((o.key, tuple(o.shape), o.dtype) for o in outgoing), file)
    makers = {o.key: o.make for o in outgoing}
    told = {**metadata, **(PLACEHOLDERS if hashes else {})}
    header = render_header(entries, told, file)
    trained = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    tally = Hashes(render_header(entries, trained, file)) if hashes else None
    with replacing(file) as out:
        out.write(header)
        for key, entry in entries.items():
            _write_one(out, key, entry, makers[key], tally, file)
        size = out.tell()
        if tally is not None:
            out.seek(0)
            out.write(render_header(entries, {**told, **tally.metadata()}, file))
    return size


def _announced(tensors: Mapping[str, Tensor]) -> Iterator[Outgoing]:
    for key, tensor in tensors.items():
        yield Outgoing(key, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)  # type: ignore[misc]


def _write_one(
    out: BinaryIO, key: str, entry: Entry, make: Callable[[], Tensor], tally: Hashes | None, file: Path
) -> None:
    """Make a tensor and write it; it is freed on return, before the next one is made."""
    tensor = make()
    if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
        raise FormatError(
            f"{file}: {shown(key)} was announced as {entry.dtype} of shape {entry.shape} "
            f"and came as {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    if tensor.is_meta or tensor.layout is not torch.strided:
        raise FormatError(
            f"{file}: {shown(key)} has no values to write: it is on {tensor.device}, with the layout {tensor.layout}"
        )
    data = _bytes(tensor)
    out.write(data)
    if tally is not None:
        tally.update(data)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().resolve_neg().contiguous().reshape(-1)
    view: memoryview = flat.view(torch.uint8).numpy().data
    return view


def _check_byte_order(file: Path) -> None:
    if sys.byteorder != "little":
        raise FormatError(f"{file}: files have their low bytes first, and this machine does not; use another machine")
