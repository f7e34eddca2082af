"""A model written again with some of its tensors changed: the same files, names and metadata, one tensor at a time.

The next tensors are read and changed while the one at hand is being written: whoever is slower, the disk or the
arithmetic, is the only one that is waited for.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Condition

import torch
from torch import Tensor

from nerine.errors import FormatError
from nerine.files.atomic import replacing_folder, write_json
from nerine.files.header import place
from nerine.files.model_file import INDEX, ModelFile, Piece
from nerine.files.store import Outgoing, write_file

__all__ = ["Change", "rewrite", "rewritten_size"]

Change = Callable[[str, Tensor, torch.dtype], Tensor]
"""(name, the tensor as it is, the number format to give it back in) -> the tensor to write."""

AHEAD = 64 * 2**20  # bytes that are made before they are needed
DEEP = 64  # tensors that are asked for at a time


def rewrite(
    model: ModelFile,
    target: str | os.PathLike[str],
    change: Change,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str | None] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> int:
    """Write `model` to `target`, every tensor as `change` makes it; the number of bytes.

    A model in one file becomes a file, one in a folder or in pieces with an index a folder, with everything else that
    is in it. `dtype` is for all floating-point tensors. `metadata` goes into the header of every file; None takes out.

    Raises:
        FormatError: the folder above does not exist, or a tensor cannot be read.
    """
    done = _Count(len(model.keys), progress)
    if len(model.pieces) == 1 and not model.is_folder:
        piece = model.pieces[0]
        return _write_piece(piece, Path(target), change, dtype, metadata or {}, done)
    if Path(target).suffix in (".safetensors", ".json"):
        raise FormatError(f"{target}: the model is in several files, so this is a folder; give a name for one")
    size = 0
    with replacing_folder(target) as folder:
        root = model.path if model.is_folder else model.path.parent
        others = model.others if model.is_folder else (model.path.name,)
        for piece in model.pieces:
            (folder / piece.place).parent.mkdir(parents=True, exist_ok=True)
            size += _write_piece(piece, folder / piece.place, change, dtype, metadata or {}, done)
        for name in others:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if INDEX.search(name) and dtype is not None:
                _write_index(root / name, folder / name, model, dtype)
            else:
                _copy(root / name, folder / name)
    return size


def rewritten_size(model: ModelFile, dtype: torch.dtype | None = None) -> int:
    """The bytes of the tensors that `rewrite` would write."""
    return sum(
        model.nbytes(key) // model.dtype(key).itemsize * _format(model.dtype(key), dtype).itemsize for key in model.keys
    )


class _Count:
    """The tensors that are done."""

    def __init__(self, total: int, progress: Callable[[int, int, str], None]) -> None:
        self.done, self.total, self._progress = 0, total, progress

    def one(self, name: str) -> None:
        self.done += 1
        self._progress(self.done, self.total, name)


def _format(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point and own.itemsize > 1 else own


def _write_piece(
    piece: Piece,
    file: Path,
    change: Change,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str | None],
    done: _Count,
) -> int:
    source = piece.source
    formats = {name: _format(source.dtype(key), dtype) for name, key in piece.keys.items()}
    sizes = ((key, source.shape(key), formats[name]) for name, key in piece.keys.items())
    order = list(place(sizes, file))
    named = {key: name for name, key in piece.keys.items()}

    def make(key: str) -> Tensor:
        return change(named[key], source.read(key), formats[named[key]])

    with _ahead(order, make) as take:

        def taken(key: str) -> Callable[[], Tensor]:
            def written() -> Tensor:
                found = take(key)
                done.one(named[key])
                return found

            return written

        outgoing = [Outgoing(key, source.shape(key), formats[named[key]], taken(key)) for key in order]
        told = {**{key: value for key, value in source.metadata.items() if not _is_hash(key)}, **metadata}
        return write_file(file, outgoing, {key: value for key, value in told.items() if value is not None})


def _is_hash(key: str) -> bool:
    """Whether an entry of the metadata says what the tensors were."""
    return key.startswith("sshs_") or key == "modelspec.hash_sha256"


@contextmanager
def _ahead(order: Sequence[str], make: Callable[[str], Tensor]) -> Iterator[Callable[[str], Tensor]]:
    """A way to take the tensors of `order`, in that order, of which one thread makes some before they are asked for."""
    left = iter(order)
    waiting: dict[str, Future[Tensor]] = {}
    ready = 0  # bytes that are made and not yet taken
    room = Condition()

    def made(key: str) -> Tensor:
        nonlocal ready
        with room:
            room.wait_for(lambda: ready < AHEAD)
        found = make(key)
        with room:
            ready += found.nbytes
        return found

    def fill() -> None:
        while len(waiting) < DEEP and (key := next(left, None)) is not None:
            waiting[key] = pool.submit(made, key)

    def take(key: str) -> Tensor:
        nonlocal ready
        fill()
        found = waiting.pop(key).result()
        with room:
            ready -= found.nbytes
            room.notify()
        return found

    pool = ThreadPoolExecutor(1, "nerine-rewrite")
    try:
        yield take
    finally:
        with room:
            ready = -(2**62)  # whoever waits for room goes on and ends
            room.notify()
        pool.shutdown(wait=True, cancel_futures=True)


def _write_index(index: Path, target: Path, model: ModelFile, dtype: torch.dtype) -> None:
    """The index of a model that has been written in another number format."""
    content = json.loads(index.read_text(encoding="utf-8"))
    places = set(content["weight_map"].values())
    folder = index.parent.relative_to(model.path if model.is_folder else index.parent).as_posix()
    own = [p for p in map(_split_place, model.pieces) if p[0] == folder and p[1] in places]
    sizes = sum(
        piece.source.nbytes(key) // piece.source.dtype(key).itemsize * _format(piece.source.dtype(key), dtype).itemsize
        for _, _, piece in own
        for key in piece.keys.values()
    )
    content["metadata"] = {**content.get("metadata", {}), "total_size": sizes}
    write_json(target, content)


def _split_place(piece: Piece) -> tuple[str, str, Piece]:
    where = Path(piece.place)
    return where.parent.as_posix(), where.name, piece


def _copy(source: Path, target: Path) -> None:
    """A copy that is on the disk."""
    shutil.copyfile(source, target)
    with open(target, "rb+") as stream:
        os.fsync(stream.fileno())
