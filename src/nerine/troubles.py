"""What can go wrong, what it means and what to do: the entries of `troubles.toml`, and how a message finds its own.

The texts are data; this file reads them when they are first asked for, and knows neither torch nor the rest of the
library. `nerine explain`, the note under a traceback and a page of the documentation are made from them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Trouble", "find", "search", "troubles"]

_FILE = Path(__file__).with_name("troubles.toml")
_RAISED = re.compile(r"^\s*\|?\s*(?:[\w.]+\.)?(\w+(?:Error|Exception|Extra|UnsupportedBase))(?::\s?|$)(.*)")
_OWN_WORDS = re.compile(r"^(?:Error|\w*Error|MissingExtra|UnsupportedBase): ")


@dataclass(frozen=True)
class Trouble:
    """One entry: the `key` it is asked for by, a `title`, what it `means`, and what to do, step by step.

    Patterns count for errors of the class `only`, where it is given and the class is known. `fallback` is the class of
    errors that it answers where no pattern of any entry does; `is_foreign` where the message comes from another
    program; `page` is the page of the documentation that says more, or "".
    """

    key: str
    title: str
    means: str
    steps: tuple[str, ...]
    patterns: tuple[re.Pattern[str], ...]
    only: str = ""
    fallback: str = ""
    is_foreign: bool = False
    page: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "key": self.key,
            "title": self.title,
            "means": self.means,
            "do": list(self.steps),
            "page": self.page,
            "foreign": self.is_foreign,
        }


@lru_cache(maxsize=1)
def troubles() -> Mapping[str, Trouble]:
    """All entries by their keys, in the order in which they are tried."""
    tables = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    return {key: _entry(key, table) for key, table in tables.items()}


def find(said: BaseException | str) -> Trouble | None:
    """The entry that explains an error, or the text of one as somebody pasted it: a message, or a whole traceback.

    None where nothing fits; an error of nerine always has one.
    """
    if isinstance(said, BaseException):
        kinds, message = [kind.__name__ for kind in type(said).__mro__], str(said)
    else:
        kinds, message = _pasted(said)
    line = " ".join(message.split())
    for entry in troubles().values():
        is_of_kind = not kinds or entry.only in ("", *kinds)
        if is_of_kind and any(pattern.search(line) for pattern in entry.patterns):
            return entry
    known = {entry.fallback: entry for entry in troubles().values() if entry.fallback}
    return next((known[kind] for kind in kinds if kind in known), None)


def search(words: str) -> list[Trouble]:
    """The entries with all of these words in them, those with the words in their titles first."""
    wanted = words.lower().split()

    def is_in(text: str) -> bool:
        return all(word in text.lower() for word in wanted)

    of_title = [entry for entry in troubles().values() if is_in(f"{entry.key} {entry.title}")]
    of_text = [
        entry
        for entry in troubles().values()
        if entry not in of_title and is_in(" ".join((entry.key, entry.title, entry.means, *entry.steps)))
    ]
    return of_title + of_text if wanted else []


def _entry(key: str, table: Mapping[str, Any]) -> Trouble:
    return Trouble(
        key=key,
        title=table["title"],
        means=" ".join(table["means"].split()),
        steps=tuple(table["do"]),
        patterns=tuple(re.compile(pattern, re.IGNORECASE) for pattern in table["patterns"]),
        only=table.get("only", ""),
        fallback=table.get("fallback", ""),
        is_foreign=table.get("foreign", False),
        page=table.get("page", ""),
    )


def _pasted(text: str) -> tuple[list[str], str]:
    """(names of classes, message) of a pasted text: what stands in its last line that begins with an error, and on."""
    lines = text.strip().splitlines()
    for at in range(len(lines) - 1, -1, -1):
        match = _RAISED.match(lines[at])
        if match is not None:
            rest = [line for line in lines[at + 1 :] if not line.strip().startswith(("nerine explain", "More: "))]
            return [match[1]], "\n".join([f"{match[1]}: {match[2]}", *rest])
    return [], _OWN_WORDS.sub("", text.strip())
