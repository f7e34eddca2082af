"""Arguments as hosts hand them over: text from a command line, or values. Parsed strictly, once, at the door.

"False", "0", "None" and "" mean what they say; a value that fits no reading, and a name that nobody knows, are errors.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from nerine.errors import OptionError, nearest

__all__ = [
    "as_bool",
    "as_float",
    "as_floats",
    "as_int",
    "as_ints",
    "as_pairs",
    "as_text",
    "is_nothing",
    "parse",
    "renamed",
]

_log = logging.getLogger("nerine")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_NOTHING = ("", "none", "null")

Reader = Callable[[str, Any], Any]


def is_nothing(value: object) -> bool:
    """Whether a value says that there is none."""
    return value is None or (isinstance(value, str) and value.strip().lower() in _NOTHING)


def _wrong(name: str, expected: str, value: object) -> OptionError:
    return OptionError(f"{name}: expected {expected}, got {value!r}")


def as_bool(name: str, value: Any) -> bool:
    """True or False; nothing is False.

    Raises:
        OptionError: neither.
    """
    text = str(value).strip().lower()
    if is_nothing(value) or text in _FALSE or (not isinstance(value, str) and value == 0):
        return False
    if text in _TRUE or (not isinstance(value, str) and value == 1):
        return True
    raise _wrong(name, "true or false", value)


def as_int(name: str, value: Any) -> int | None:
    """A whole number, or None.

    Raises:
        OptionError: it is none.
    """
    found = as_float(name, value)
    if found is None or found == int(found):
        return None if found is None else int(found)
    raise _wrong(name, "a whole number", value)


def as_float(name: str, value: Any) -> float | None:
    """A finite number, or None.

    Raises:
        OptionError: it is none.
    """
    if is_nothing(value):
        return None
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise _wrong(name, "a number", value)
    return found


def as_text(name: str, value: Any) -> str | None:
    """A word, or None."""
    return None if is_nothing(value) else str(value).strip()


def _listed(value: Any) -> list[Any]:
    """The entries of a list, or of text such as "1, 2" or "[1, 2]"."""
    if isinstance(value, list | tuple):
        return list(value)
    text = str(value).strip()
    if text[:1] + text[-1:] in ("[]", "()"):
        text = text[1:-1]
    return [part.strip().strip("'\"") for part in text.split(",")]


def as_floats(name: str, value: Any) -> list[float] | None:
    """A list of numbers, an empty entry of which is 0; or None.

    Raises:
        OptionError: an entry is no number.
    """
    return None if is_nothing(value) else [as_float(name, entry) or 0.0 for entry in _listed(value)]


def as_ints(name: str, value: Any) -> list[int] | None:
    """A list of whole numbers, or None.

    Raises:
        OptionError: an entry is no whole number.
    """
    return None if is_nothing(value) else [as_int(name, entry) or 0 for entry in _listed(value)]


def as_pairs(name: str, value: Any) -> dict[str, float] | None:
    """Text such as "key=1, other=2.5", split at commas that a new pair follows; or None.

    Raises:
        OptionError: a part is no pair, or its value is no number.
    """
    if is_nothing(value):
        return None
    pairs = value.items() if isinstance(value, Mapping) else _pairs(name, str(value))
    found = {}
    for key, number in pairs:
        read = as_float(f"{name} ({key})", number)
        if read is None:
            raise _wrong(f"{name} ({key})", "a number", number)
        found[str(key)] = read
    return found


def _pairs(name: str, text: str) -> list[tuple[str, str]]:
    """(key, value); a key may hold commas, as in the regular expression "a{1,2}", but no "="."""
    found, waiting = [], ""
    for part in text.split(","):
        waiting = f"{waiting},{part}" if waiting else part
        if "=" in waiting:
            key, _, value = waiting.rpartition("=")
            found.append((key.strip(), value.strip()))
            waiting = ""
    if waiting.strip():
        raise _wrong(name, "pairs such as key=8, other=16", text)
    return found


def renamed(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """`given` with the names of today for those of the past, with a warning for each."""
    found = {key: value for key, value in given.items() if key not in names}
    for old in given.keys() & names.keys():
        _log.warning("%s is deprecated; use %s", old, names[old])
        found.setdefault(names[old], given[old])
    return found


def parse(given: Mapping[str, Any], known: Mapping[str, Reader], where: str) -> dict[str, Any]:
    """The arguments that were given, each read by its kind.

    Raises:
        OptionError: a name that is not known, or a value that cannot be read.
    """
    for name in given:
        if name not in known:
            raise OptionError(f"{where}: there is no argument {name!r}. {nearest(name, list(known))}")
    return {name: known[name](f"{where}: {name}", value) for name, value in given.items()}
