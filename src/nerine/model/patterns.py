"""Patterns: how the layers of a model are named in targets and rules.

A pattern is a piece of a layer's path. "to_q", "attn1.to_q" and "mid_block" match every layer at or below a module
so named; `*` and `?` stand for letters within one name; `[4-9,12]` in the place of a name stands for these numbers,
`[20-]` for all from there; "type:Attention" matches every layer at or below a module of a class (or a subclass) so
called; "re:..." is a regular expression for the whole path. A class or a predicate may stand in the place of a pattern.
What a preset chooses is not known here: `nerine.model.presets` turns it into a predicate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from nerine.errors import OptionError
from nerine.model.pipeline import unwrapped

__all__ = ["Match", "Predicate", "is_explicit", "lineage", "matches", "means"]

Predicate = Callable[[str, nn.Module], bool]
Match = str | type[nn.Module] | Predicate


def matches(match: Match, path: str, module: nn.Module, above: Sequence[nn.Module] = ()) -> bool:
    """Whether the layer `module` at `path`, below the modules `above`, is meant by `match`."""
    if isinstance(match, type):
        return any(isinstance(m, match) for m in (module, *above))
    if not isinstance(match, str):
        return bool(match(path, module))
    if match.startswith("re:"):
        return _is_whole(match, path)
    if match.startswith("type:"):
        return any(_is_called(m, match[5:]) for m in (module, *above))
    wanted, names = match.split("."), path.split(".")
    return any(
        all(_is_name(name, want) for name, want in zip(names[i:], wanted, strict=False))
        for i in range(len(names) - len(wanted) + 1)
    )


def means(pattern: str, path: str) -> bool:
    """Whether a pattern means the last name of `path`, and not only something above it."""
    if pattern.startswith("re:"):
        return _is_whole(pattern, path)
    if pattern.startswith("type:"):
        return False  # a parameter has no class that anybody would name
    wanted = pattern.split(".")
    names = path.split(".")[-len(wanted) :]
    return len(names) == len(wanted) and all(map(_is_name, names, wanted))


def is_explicit(match: Match, path: str, module: nn.Module) -> bool:
    """Whether a match means this very layer, and not only something above it."""
    if isinstance(match, str) and not match.startswith("type:"):
        return means(match, path)
    return matches(match, path, module)


def lineage(model: nn.Module, path: str) -> tuple[nn.Module, ...]:
    """The modules above the layer or parameter at `path`, the model first."""
    found: list[nn.Module] = []
    child: nn.Module | None = model
    for name in path.split("."):
        module = None if child is None else unwrapped(child)
        if module is None:
            break
        found.append(module)
        child = module._modules.get(name)
    return tuple(found)


def _is_name(name: str, want: str) -> bool:
    """Whether one name of a path is meant by one name of a pattern."""
    if not re.fullmatch(r"\[[\d\s,-]*\]", want):
        return fnmatchcase(name, want)
    return any(name.isdecimal() and first <= int(name) <= last for first, last in _ranges(want))


def _ranges(text: str) -> list[tuple[int, float]]:
    """The first and last numbers of "[4-9,12,20-]"."""
    found: list[tuple[int, float]] = []
    for part in text[1:-1].split(","):
        bounds = re.fullmatch(r"\s*(\d+)\s*(-)?\s*(\d+)?\s*", part)
        if bounds is None or (bounds[3] and not bounds[2]):
            raise OptionError(f"the pattern {text!r}: expected numbers such as [4-9,12] or [20-], found {part!r}")
        last = float(bounds[3]) if bounds[3] else float("inf") if bounds[2] else float(bounds[1])
        if last < int(bounds[1]):
            raise OptionError(f"the pattern {text!r}: {part.strip()!r} ends before it begins")
        found.append((int(bounds[1]), last))
    return found


def _is_whole(pattern: str, path: str) -> bool:
    """Whether the regular expression after "re:" is the whole path."""
    try:
        return re.fullmatch(pattern[3:], path) is not None
    except re.error as error:
        raise OptionError(f"the pattern {pattern!r} is not a regular expression: {error}") from error


def _is_called(module: nn.Module, name: str) -> bool:
    """Whether the class of a module, or one that it is derived from, has this name."""
    return any(fnmatchcase(kind.__name__, name) for kind in type(module).__mro__[:-1])
