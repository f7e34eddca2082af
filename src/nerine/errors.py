"""The errors of nerine, all in one tree, so that one ``except NerineError`` catches whatever the library raises.

    NerineError
    ├── ShapeError       (ValueError)    a tensor does not have the shape that its layer or its partner asks for
    ├── OptionError      (TypeError)     a setting that does not exist, or a value it cannot take
    ├── TargetError      (LookupError)   no layer was matched, or one was matched that must not be
    ├── FormatError      (ValueError)    a file that cannot be read, is damaged, or belongs to another model
    ├── UnsupportedBase  (TypeError)     a layer whose weight nerine cannot adapt
    ├── DeviceError      (RuntimeError)  a layer, its input and its adapter on devices that do not go together
    ├── MergeError       (RuntimeError)  merging at a time when the result would be wrong
    └── MissingExtra     (ImportError)   an optional part that is not installed

Every message says where, what was expected, what was found and what to do. Under a traceback stands one line more,
which names the entry of `nerine explain`; it is looked up when somebody shows the traceback. Nothing here knows torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "DeviceError",
    "FormatError",
    "MergeError",
    "MissingExtra",
    "NerineError",
    "OptionError",
    "ShapeError",
    "TargetError",
    "UnsupportedBase",
    "nearest",
    "shown",
]


class NerineError(Exception):
    """The root of every error that nerine raises."""

    @property
    def __notes__(self) -> list[str]:
        """The lines under a traceback (PEP 678; Python 3.11 and newer show them), with the entry that explains more."""
        own: dict[str, list[str]] = self.__dict__
        if "__notes__" not in own:
            from nerine.troubles import find

            entry = find(self)
            own["__notes__"] = [] if entry is None else [f"More: nerine explain {entry.key}"]
        return own["__notes__"]

    @__notes__.setter
    def __notes__(self, notes: list[str]) -> None:
        self.__dict__["__notes__"] = notes


class ShapeError(NerineError, ValueError):
    """A tensor whose shape contradicts its layer or another tensor of the same adapter."""


class OptionError(NerineError, TypeError):
    """A setting that does not exist, or a value that the setting cannot take."""


class TargetError(NerineError, LookupError):
    """The rules match no layer, or a layer that must not be adapted this way."""


class FormatError(NerineError, ValueError):
    """A file that is damaged, of an unknown format, or made for another model."""


class UnsupportedBase(NerineError, TypeError):
    """A layer whose weight nerine does not know how to adapt."""


class DeviceError(NerineError, RuntimeError):
    """A layer, its input and its adapter on devices that do not go together."""


class MergeError(NerineError, RuntimeError):
    """A merge or unmerge that would give wrong numbers at this moment."""


class MissingExtra(NerineError, ImportError):
    """An optional dependency that is not installed; the message names the extra that brings it."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """The end of an error message: the candidates closest to `name`, or all of them where none is close."""
    known = sorted(set(candidates))
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return f"Did you mean {' or '.join(repr(c) for c in close)}?"
    return f"Known: {', '.join(known)}." if known else "There are none."


def shown(text: object, longest: int = 200) -> str:
    """A text from a file as it may be printed anywhere: ASCII alone, control characters escaped, and not too long."""
    plain = ascii(str(text)[: longest + 1])[1:-1]
    return plain if len(plain) <= longest else plain[: longest - 3] + "..."
