"""Where a tool writes: never over what it reads, and over other things only when it is told to."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from nerine.errors import OptionError

__all__ = ["check_output"]


def check_output(target: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]], force: bool = False) -> Path:
    """The path to write to.

    Raises:
        OptionError: it is one of the inputs or lies in one, its folder is missing, or something is there and `force`
            is not set.
    """
    place = Path(target)
    here = _real(place)
    for other in inputs:
        there = _real(Path(other))
        if here == there or (there in here.parents and there.is_dir()):
            raise OptionError(f"{place}: this is what is read; write to another place")
        if here in there.parents:
            raise OptionError(f"{place}: {other}, which is read, lies in this folder; write to another place")
    if not here.parent.is_dir():
        raise OptionError(f"{place}: the folder {place.parent} does not exist; create it first")
    if os.path.lexists(place) and not force:
        kind = "a folder" if place.is_dir() else "a file"
        raise OptionError(f"{place}: there is {kind} of that name; choose another, or say --force to replace it")
    return place


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))
