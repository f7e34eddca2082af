"""A file of rules: which layers get which algorithm, rank, alpha and learning rate, as TOML instead of code.

    [[rule]]
    match = "attn1"                   # a pattern or a preset, or a list of them
    algorithm = "lokr"                # the settings of the algorithm stand beside it
    rank = 8
    lr = 1e-4

    [[rule]]
    match = "mid_block"
    skip = true

As in code the first rule that matches a layer wins. Nothing is guessed: an unknown key is an error that says where.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nerine.algorithms import Algorithm, build
from nerine.errors import OptionError, nearest
from nerine.model.rules import Rule
from nerine.model.toml import check_keys, parse, words_of

__all__ = ["parse_rules", "read_rules"]

_OWN = ("match", "skip", "lr", "strength", "rows")


def read_rules(file: str | os.PathLike[str]) -> list[Rule]:
    """The rules of a TOML file, for `attach` and `plan`, which also take its path itself.

    Raises:
        OptionError: it cannot be read, or a rule says something that does not exist; the message gives file, line and
            number of the rule.
    """
    where = os.fspath(file)
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{where}: the rules cannot be read: {error}") from error
    return parse_rules(text, where)


def parse_rules(text: str, where: str = "rules") -> list[Rule]:
    """The rules of a TOML text; `where` names it in errors.

    Raises:
        OptionError: as `read_rules`.
    """
    data = parse(text, where)
    check_keys(data, ("rule",), where)
    tables = data.get("rule")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise OptionError(f"{where}: expected at least one section [[rule]] with match and algorithm")
    heads = [number for number, line in enumerate(text.splitlines(), 1) if "".join(line.split()).startswith("[[rule]]")]
    lines = heads if len(heads) == len(tables) else [0] * len(tables)
    rules: list[Rule] = []
    for number, (table, line) in enumerate(zip(tables, lines, strict=True), 1):
        at = f"{where}, line {line}, rule {number}" if line else f"{where}, rule {number}"
        rules += _rules_of(table, at)
    return rules


def _rules_of(table: Mapping[str, Any], where: str) -> list[Rule]:
    """One section, as a rule for each of its matches."""
    settings = {key: value for key, value in table.items() if key not in _OWN}
    match = table.get("match")
    wanted = words_of({"match": [match] if isinstance(match, str) else match}, "match", where) if match else ()
    if not wanted:
        raise OptionError(f'{where}: match says which layers are meant, as in match = "attn1"; found {match!r}')
    rows = table.get("rows")
    try:
        algorithm = _algorithm(table, settings)
        return [
            Rule(
                one,
                algorithm,
                lr=table.get("lr"),
                strength=table.get("strength", 1.0),
                rows=tuple(rows) if isinstance(rows, list) else rows,
            )
            for one in wanted
        ]
    except OptionError as error:
        raise OptionError(f"{where} (match {', '.join(map(repr, wanted))}): {error}") from error


def _algorithm(table: Mapping[str, Any], settings: Mapping[str, Any]) -> Algorithm | None:
    skip = table.get("skip", False)
    if not isinstance(skip, bool):
        raise OptionError(f"skip must be true or false, got {skip!r}")
    if skip:
        if settings:
            raise OptionError(f"skip = true has no use for {', '.join(settings)}")
        return None
    if "algorithm" not in settings:
        stray = [f"{key!r} is unknown. {nearest(key, ['algorithm', *_OWN])}" for key in settings]
        raise OptionError(" ".join(['algorithm is missing, as in algorithm = "lora" (or skip = true).', *stray[:1]]))
    inner = settings.get("inner", {})
    if not isinstance(inner, dict):
        raise OptionError(f'inner must be a table, as in inner = {{ algorithm = "lora", rank = 8 }}, got {inner!r}')
    return build(settings)
