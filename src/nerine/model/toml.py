"""TOML for presets and rules: text to plain data, and the checks of tables that both of them need."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

from nerine.errors import OptionError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["check_keys", "parse", "words_of"]


def parse(text: str, where: str) -> dict[str, Any]:
    """The data of a TOML text; `where` names it in errors.

    Raises:
        OptionError: it is not TOML.
    """
    try:
        data: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{where}: not valid TOML: {error}") from error
    return data


def check_keys(table: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Whether all keys of a table are known.

    Raises:
        OptionError: one is not.
    """
    for key in table:
        if key not in known:
            raise OptionError(f"{where}: no setting is called {key!r}. {nearest(key, known)}")


def words_of(table: Mapping[str, Any], key: str, where: str, known: Collection[str] = ()) -> tuple[str, ...]:
    """The list of texts under a key; empty where there is none.

    Raises:
        OptionError: it is no list of texts, or one of them is not among `known`.
    """
    found = table.get(key, [])
    if not isinstance(found, list) or not all(isinstance(word, str) and word for word in found):
        raise OptionError(f"{where}: {key} must be a list of texts, got {found!r}")
    for word in found:
        if known and word not in known:
            raise OptionError(f"{where}: {key} knows no {word!r}. {nearest(word, known)}")
    return tuple(found)
