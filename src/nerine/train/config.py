"""The configuration file: TOML to settings and back, and the commented example that a user starts from.

Sections are those of the settings. Nothing is guessed: an unknown key is an error with the nearest name, and with the
section that it belongs to where that is another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from nerine.errors import OptionError, nearest
from nerine.model.toml import parse
from nerine.train.settings import Key, Subset, TrainSettings, check_number, keys

__all__ = ["example", "parse_config", "read", "read_config", "settings_of", "to_toml"]

SUBSET = "subset"
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def read_config(file: str | os.PathLike[str]) -> dict[str, Any]:
    """{key: value} of a configuration file, checked; the list under "subset" has the folders of [[subset]], and paths
    are meant from where the file lies.

    Raises:
        OptionError: it cannot be read, or has a section, key or value that does not exist; the message says which.
    """
    where = os.fspath(file)
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{where}: the configuration cannot be read: {error}") from error
    return _beside(parse_config(text, where), Path(file).parent)


def parse_config(text: str, where: str) -> dict[str, Any]:
    """The same from a text; `where` names it in errors, and paths are as they stand there.

    Raises:
        OptionError: as `read_config`.
    """
    data = parse(text, where)
    sections: dict[str, dict[str, Key]] = {}
    for one in keys():
        sections.setdefault(one.section, {})[one.name] = one
    found: dict[str, Any] = {}
    for section, table in data.items():
        if section == SUBSET:
            found[SUBSET] = [_subset(one, f"{where}, subset {n}") for n, one in enumerate(_tables(table, where), 1)]
        elif section not in sections:
            raise OptionError(f"{where}: {_stray(section, sections)}")
        elif not isinstance(table, dict):
            raise OptionError(f"{where}: expected a section [{section}], found {section} = {table!r}")
        else:
            for name, value in table.items():
                if name not in sections[section]:
                    raise OptionError(f"{where}: [{section}] has no {name!r}. {_where(name, section, sections)}")
                found[name] = read(sections[section][name], value, f"{where}: {name}")
    return found


def settings_of(given: Mapping[str, Any]) -> TrainSettings:
    """The settings with those that were given, as `read_config` and the command line give them.

    Raises:
        OptionError: some of them exclude each other.
    """
    sections: dict[str, dict[str, Any]] = {}
    known = {one.name: one for one in keys()}
    for name, value in given.items():
        if name != SUBSET:
            sections.setdefault(known[name].section, {})[name] = value
    made = {one.name: one.default_factory for one in fields(TrainSettings) if one.default_factory is not MISSING}
    settings = TrainSettings(
        **{name: make(**sections.get(name, {})) for name, make in made.items()}, subsets=tuple(given.get(SUBSET, ()))
    )
    _check(settings)
    return settings


def read(one: Key, value: Any, where: str) -> Any:
    """The value of a setting, from TOML or from a text of the command line.

    Raises:
        OptionError: it is not of the setting's type, or not among its choices.
    """
    kinds = one.kinds
    found = _typed(kinds, value)
    if found is MISSING:
        raise OptionError(f"{where}: expected {_said(one)}, found {value!r}")
    if isinstance(found, tuple) and "tuple[Path" in one.kind:
        found = tuple(map(Path, found))
    if one.choices and found not in one.choices:
        raise OptionError(f"{where}: there is no {found!r}. {nearest(str(found), one.choices)}")
    if isinstance(found, int | float) and not isinstance(found, bool):
        check_number(where, found, one.at_least)
    return found


def _typed(kinds: frozenset[str], value: Any) -> Any:
    """`value` as one of those types; MISSING where it is none of them."""
    if isinstance(value, str) and "str" not in kinds and "Path" not in kinds:
        value = _from_text(value)
    if isinstance(value, bool):
        return value if "bool" in kinds else MISSING
    if isinstance(value, int | float):
        if "int" in kinds and value == int(value):
            return int(value)
        return float(value) if "float" in kinds else MISSING
    if "tuple" in kinds and isinstance(value, list | tuple | str | Path):
        several = [value] if isinstance(value, str | Path) else list(value)
        return tuple(several) if all(isinstance(v, str | Path) for v in several) else MISSING
    if "Mapping" in kinds and isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, str | Path) and "Path" in kinds:
        return Path(value)
    if value is None:
        return None if "None" in kinds else MISSING
    return value if isinstance(value, str) and "str" in kinds else MISSING


def _from_text(text: str) -> Any:
    word = text.strip().lower()
    if word in _TRUE[:-1] or word in _FALSE[:-1]:
        return word in _TRUE
    if word == "none":
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _said(one: Key) -> str:
    names = {
        "bool": "true or false",
        "int": "a whole number",
        "float": "a number",
        "str": "a text",
        "Path": "a path",
        "tuple": "a list of texts",
        "Mapping": "a table of settings",
    }
    return " or ".join(said for kind, said in names.items() if kind in one.kinds)


def _tables(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise OptionError(f"{where}: expected sections [[{SUBSET}]] with a folder each, found {value!r}")
    return value


def _subset(table: Mapping[str, Any], where: str) -> Subset:
    known = {one.name: Key(SUBSET, one.name, str(one.type), None, "", (), "", 0) for one in fields(Subset)}
    for name in table:
        if name not in known:
            raise OptionError(f"{where}: [[{SUBSET}]] has no {name!r}. {nearest(name, known)}")
    if "folder" not in table:
        raise OptionError(f'{where}: expected a folder, as in folder = "pictures/dog"')
    return Subset(**{name: read(known[name], value, f"{where}: {name}") for name, value in table.items()})


def _stray(name: str, sections: Mapping[str, Mapping[str, Key]]) -> str:
    home = next((section for section, known in sections.items() if name in known), None)
    if home is not None:
        return f"{name} belongs into the section [{home}]"
    return f"there is no section [{name}]. {nearest(name, [*sections, SUBSET])}"


def _where(name: str, section: str, sections: Mapping[str, Mapping[str, Key]]) -> str:
    home = next((other for other, known in sections.items() if name in known), None)
    return f"It belongs into [{home}]." if home is not None else nearest(name, sections[section])


def _beside(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same with paths meant from the folder of the file."""
    placed = dict(found)
    for one in keys():
        if one.name in found and "Path" in one.kind and found[one.name] is not None:
            value = found[one.name]
            placed[one.name] = tuple(folder / v for v in value) if isinstance(value, tuple) else folder / value
    if "base" in found and found["base"] != "tiny":
        placed["base"] = str(folder / found["base"])
    if SUBSET in found:
        placed[SUBSET] = [
            Subset(**{**{f.name: getattr(one, f.name) for f in fields(Subset)}, "folder": folder / one.folder})
            for one in found[SUBSET]
        ]
    return placed


def _check(settings: TrainSettings) -> None:
    """Whether the settings go together."""
    adapter, optimizer, objective = settings.adapter, settings.optimizer, settings.objective
    if adapter.rules is not None and (adapter.rank is not None or adapter.dora or adapter.settings):
        raise OptionError("a file of rules has the algorithms in it: leave out rank, alpha, dora and settings")
    if optimizer.steps is not None and optimizer.epochs is not None:
        raise OptionError("steps and epochs both say how long: give one of them")
    if objective.min_timestep >= objective.max_timestep:
        raise OptionError(
            f"min_timestep must be below max_timestep, got {objective.min_timestep} and {objective.max_timestep}"
        )
    if settings.validation.validation is not None and settings.validation.validation_share:
        raise OptionError("validation and validation_share both say what to validate with: give one of them")
    for name, share in (("validation_share", settings.validation.validation_share), ("ema", optimizer.ema)):
        if share >= 1:
            raise OptionError(f"{name} must be below 1, got {share:g}")


# -- back to TOML ------------------------------------------------------------------------------------------------------
def to_toml(settings: TrainSettings) -> str:
    """All settings as a configuration file; reading it gives the same settings again (paths are made absolute)."""
    lines: list[str] = []
    section = ""
    for one in keys():
        if one.section != section:
            section = one.section
            lines += ["", f"[{section}]"]
        value = getattr(getattr(settings, section), one.name)
        if value is not None:
            lines.append(f"{one.name} = {_toml(_absolute(one, value))}")
    for subset in settings.subsets:
        lines += ["", f"[[{SUBSET}]]"]
        given = ((f.name, getattr(subset, f.name)) for f in fields(Subset))
        lines += [f"{name} = {_toml(_absolute(None, value))}" for name, value in given if value is not None]
    return "\n".join(lines[1:]) + "\n"


def _absolute(one: Key | None, value: Any) -> Any:
    if isinstance(value, Path):
        return value.absolute()
    if isinstance(value, tuple):
        return [_absolute(None, v) for v in value]
    if one is not None and one.name == "base" and value != "tiny":
        return Path(value).absolute()
    return value


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml(str(k))} = {_toml(v)}" for k, v in value.items()) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, Path):
        return json.dumps(str(value))
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value)


def example() -> str:
    """A configuration file in which every key stands as a comment, with its default and what it does."""
    return "\n".join(_example()) + "\n"


def _example() -> Iterator[str]:
    yield "# A training run: `nerine train config.toml`. Everything has a default; take the # away to change it."
    yield "# Paths are meant from where this file lies."
    section = ""
    for one in keys():
        if one.section != section:
            section = one.section
            yield ""
            yield f"[{section}]"
        choices = f" ({', '.join(one.choices)})" if one.choices else ""
        yield f"# {one.about}{choices}"
        yield f"# {one.name} = {_shown(one)}"
    yield ""
    yield "# Folders with settings of their own, as many as you like; what is left out is as in [data]."
    yield f"# [[{SUBSET}]]"
    yield '# folder = "pictures/dog"'
    yield "# repeats = 10"
    yield '# prefix = "sks dog, "'


def _shown(one: Key) -> str:
    examples = {
        "rank": "16",
        "alpha": "16.0",
        "text_encoder_lr": "5e-5",
        "resolution": "512",
        "bucket_step": "64",
        "caption": '"a photo of a dog"',
        "steps": "1000",
        "epochs": "10",
        "lr": "1e-4",
        "guidance": "5.0",
        "sample_width": "512",
        "sample_height": "512",
    }
    if one.default is None:
        return examples.get(one.name, '"path"')
    if one.name == "data":
        return '["pictures"]'
    return _toml(one.default if not isinstance(one.default, Path) else str(one.default))
