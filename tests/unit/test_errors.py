"""One tree of errors, each also of the builtin kind that a caller would expect, and hints at what was meant."""

from __future__ import annotations

import inspect

import pytest

from nerine import errors
from nerine.errors import NerineError, nearest

KINDS = {
    "ShapeError": ValueError,
    "OptionError": TypeError,
    "TargetError": LookupError,
    "FormatError": ValueError,
    "UnsupportedBase": TypeError,
    "DeviceError": RuntimeError,
    "MergeError": RuntimeError,
    "MissingExtra": ImportError,
}


def test_the_tree_is_as_drawn() -> None:
    found = {n for n, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, NerineError)} - {"NerineError"}
    assert found == set(KINDS)
    assert all(name in (errors.__doc__ or "") for name in KINDS)


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_each_is_caught_as_both(name: str, kind: type[Exception]) -> None:
    error = getattr(errors, name)
    assert issubclass(error, (NerineError, kind))
    assert issubclass(error, kind)
    assert error.__doc__
    assert str(error("words")) == "words"


@pytest.mark.parametrize(
    ("name", "known", "words"),
    [
        ("rnak", ["rank", "alpha"], "Did you mean 'rank'?"),
        ("attn", ["attn1", "attn2", "to_q"], "Did you mean 'attn2' or 'attn1'?"),
        ("zzz", ["b", "a"], "Known: a, b."),
        ("zzz", [], "There are none."),
    ],
)
def test_nearest(name: str, known: list[str], words: str) -> None:
    assert nearest(name, known) == words
