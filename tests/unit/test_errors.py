"""One tree of errors, each also of the builtin kind that a caller would expect, and hints at what was meant."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import traceback

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


# -- the line under a traceback ----------------------------------------------------------------------------------------
def notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))


def test_a_traceback_names_the_entry_that_explains_it() -> None:
    error = errors.MergeError("a: 'style' is merged already; unmerge before merging again")
    assert notes(error) == ["More: nerine explain merged-already"]
    assert str(error) == "a: 'style' is merged already; unmerge before merging again"
    if sys.version_info >= (3, 11):
        lines = traceback.format_exception_only(error)
        assert lines == [f"nerine.errors.MergeError: {error}\n", "More: nerine explain merged-already\n"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with Python 3.11")
def test_notes_of_others_stand_beside_ours_and_belong_to_one_error() -> None:
    first, second = errors.ShapeError("@"), errors.ShapeError("@")
    first.add_note("from elsewhere")  # type: ignore[attr-defined,unused-ignore]
    assert notes(first) == ["More: nerine explain shape-mismatch", "from elsewhere"]
    assert notes(second) == ["More: nerine explain shape-mismatch"]


def test_an_error_travels_between_processes() -> None:
    error = errors.FormatError("a.safetensors: 3 of its keys")
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert str(again) == str(error)
        assert notes(again) == notes(error)
