"""Writing that leaves the old file whole until the new one is: a neighbour is written, flushed and renamed.

Nothing here knows what is written.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from nerine.errors import FormatError

__all__ = ["replacing", "replacing_folder", "write_json", "write_text"]

NEW, OLD = ".new", ".old"  # the folder that is being written, and the one that it takes the place of

# Windows has no such locks: what a killed program leaves is not cleared away there.
fcntl = importlib.import_module("fcntl") if os.name == "posix" else None


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """An open file that takes the name `path` at the end, complete and on the disk.

    An error, an interruption or a full disk leaves whatever was there before, and no rubbish. What a killed program
    left of the same file is cleared away by the next writer.

    Raises:
        FormatError: the folder does not exist, or a folder has that name.
    """
    file = Path(path)
    if not file.parent.is_dir():
        raise FormatError(f"{file}: the folder {file.parent} does not exist; create it first")
    if file.is_dir():
        raise FormatError(f"{file}: expected the name of a file, found a folder there; choose another name")
    _clear_away(file)
    out, temporary = _open_neighbour(file)
    try:
        with out:
            yield out
            out.flush()
            os.fsync(out.fileno())
            os.chmod(temporary, _mode(file))
            if fcntl is not None:
                os.replace(temporary, file)  # while the lock is held
        if fcntl is None:
            os.replace(temporary, file)  # Windows renames closed files only
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(file.parent)


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder that takes the name `path` at the end, with all that was written into it by then.

    Whoever writes into it sees to it that the files are on the disk. An error, an interruption or a full disk leaves
    whatever was there before, and no rubbish; what a killed program left is cleared away by the next writer.

    Raises:
        FormatError: the folder above does not exist, or a file has that name.
    """
    place = Path(path)
    if not place.parent.is_dir():
        raise FormatError(f"{place}: the folder {place.parent} does not exist; create it first")
    if place.is_file():
        raise FormatError(f"{place}: expected the name of a folder, found a file there; choose another name")
    _clear_away(place)
    held, mark = _open_neighbour(place)
    new, old = Path(mark + NEW), Path(mark + OLD)
    try:
        with held:
            new.mkdir()
            yield new
            _sync_folder(new)
            if place.exists():
                os.replace(place, old)
            os.replace(new, place)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not place.exists():
            os.replace(old, place)
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(mark)
    shutil.rmtree(old, ignore_errors=True)
    _sync_folder(place.parent)


def write_text(path: str | os.PathLike[str], text: str) -> int:
    """Write a text in UTF-8, whole or not at all; the number of bytes.

    Raises:
        FormatError: the folder does not exist, or the text has characters that UTF-8 cannot hold.
    """
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"{path}: the text cannot be written in UTF-8 ({error})") from None
    with replacing(path) as out:
        out.write(data)
    return len(data)


def write_json(path: str | os.PathLike[str], data: Any) -> int:
    """Write `data` as JSON with sorted keys, whole or not at all; the same content gives the same bytes.

    Raises:
        FormatError: the folder does not exist, or JSON cannot hold the data.
    """
    try:
        text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: expected data that JSON can hold ({error})") from None
    return write_text(path, text + "\n")


def _open_neighbour(file: Path) -> tuple[BinaryIO, str]:
    """A locked new file beside `file`: the lock is what says that its writer lives."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=_prefix(file), suffix=".part")
        out = os.fdopen(descriptor, "wb")
        _lock(descriptor, wait=True)
        if os.fstat(descriptor).st_nlink or os.name != "posix":
            return out, name
        out.close()  # another writer took it for a dead one's between its making and its locking


def _prefix(file: Path) -> str:
    """How the names of its neighbours begin; short enough that they are possible wherever its own is."""
    return f".{file.name[:50]}."


def _lock(descriptor: int, wait: bool) -> bool:
    """Whether the open file is locked now; a file system without locks has no dead writers that could be told."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _clear_away(file: Path) -> None:
    """Remove neighbours of `file` that nobody holds a lock on: their writers were killed."""
    if fcntl is None:
        return
    own = re.compile(rf"{re.escape(_prefix(file))}[a-z0-9_]{{8}}\.part")
    for name in filter(own.fullmatch, os.listdir(file.parent)):
        with contextlib.suppress(OSError):  # of another user, or gone meanwhile: not ours to clear away
            descriptor = os.open(file.parent / name, os.O_RDWR)
            try:
                if _lock(descriptor, wait=False):
                    _clear_folders(file, name)
                    os.unlink(file.parent / name)
            finally:
                os.close(descriptor)


def _clear_folders(place: Path, mark: str) -> None:
    """What a killed writer of a folder left: the old one goes back to its place where nothing has taken it."""
    new, old = place.parent / (mark + NEW), place.parent / (mark + OLD)
    if old.is_dir() and not place.exists():
        os.replace(old, place)
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _mode(file: Path) -> int:
    """Permissions of the file that is replaced, else those that a new file would get."""
    if file.exists():
        return file.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_folder(folder: Path) -> None:
    """Make the new name durable, where the system lets folders be synced."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
