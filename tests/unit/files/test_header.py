"""The header: everything that safetensors refuses is refused, in words, and nothing else escapes."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import event, example, given
from hypothesis import strategies as st

from nerine import FormatError
from nerine.errors import shown
from nerine.files import header
from nerine.files.header import DTYPES, parse_header, place, render_header
from nerine.files.store import open_file

GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {**GOOD["a"], **changes}}


def file_of(text: bytes, size: int) -> bytes:
    return struct.pack("<Q", len(text)) + text + bytes(size)


WRONG: list[tuple[str, Any, str]] = [
    ("no object", b"[1]", "does not begin with a brace"),
    ("a space before it", b" {}", "does not begin with a brace"),
    ("no UTF-8", b'{"\xff": 1}', "is no JSON"),
    ("cut", b'{"a"', "is no JSON"),
    ("a comma too much", b'{"a":{},}', "is no JSON"),
    ("a raw control character", b'{"a\n":{}}', "is no JSON"),
    ("something after it", b"{} {}", "is no JSON"),
    ("deep", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ("a name twice", b'{"a":1,"a":1}', "a comes twice"),
    ("a field twice", b'{"a":{"dtype":"F32","dtype":"F32"}}', "dtype comes twice"),
    ("metadata twice", b'{"__metadata__":{},"__metadata__":{}}', "__metadata__ comes twice"),
    ("metadata that is none", {"__metadata__": None}, "metadata is not text to text"),
    ("a number in the metadata", {"__metadata__": {"a": 1}}, "metadata is not text to text"),
    ("half a character in the metadata", rb'{"__metadata__":{"a":"\ud800"}}', "metadata is not text to text"),
    ("half a character in a name", rb'{"\udfff":{}}', "is no text"),
    ("a list as an entry", {"a": [1]}, "expected dtype, shape and data_offsets"),
    ("a field too few", {"a": {"dtype": "F32", "shape": [2]}}, "expected dtype, shape and data_offsets"),
    ("a field too many", entry(more=1), "and these alone"),
    ("an unknown format", entry(dtype="F99"), "its dtype is 'F99', expected one of U64"),
    ("a format that is no text", entry(dtype=["F32"]), "its dtype is"),
    ("a number as a shape", entry(shape=2), "its shape is 2"),
    ("a negative axis", entry(shape=[-2]), "the number -2"),
    ("a negative zero", b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', "the number -0"),
    ("a fraction", entry(shape=[2.0]), "its shape is"),
    ("a truth as an axis", entry(shape=[True, 2]), "its shape is"),
    ("a text as an axis", entry(shape=["2"]), "its shape is"),
    ("a nested shape", entry(shape=[[2]]), "its shape is"),
    ("too many axes", entry(shape=[1] * 40 + [2]), "at most 32 whole numbers"),
    ("a number of 5,000 digits", b'{"a":' + b"9" * 5000 + b"}", "the number 999"),
    ("an axis of 20 digits", entry(shape=[2**64], data_offsets=[0, 0]), "the number 18446744073709551616"),
    ("an axis of 2**63", entry(shape=[2**63, 0], data_offsets=[0, 0]), "whole numbers below 2**63"),
    ("a product beyond 2**63", entry(shape=[2**40, 2**40], data_offsets=[0, 0]), "larger than any memory"),
    ("a product beyond 2**63 times 0", entry(shape=[2**40, 0, 2**40], data_offsets=[0, 0]), "larger than any memory"),
    ("infinity", b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}', "has Infinity"),
    ("one offset", entry(data_offsets=[8]), "its data_offsets are"),
    ("three offsets", entry(data_offsets=[0, 4, 8]), "its data_offsets are"),
    ("offsets the wrong way round", entry(data_offsets=[8, 0]), "its data_offsets are"),
    ("true offsets", entry(data_offsets=[False, 8]), "its data_offsets are"),
    ("no offsets", entry(data_offsets=None), "its data_offsets are"),
    ("more bytes than the shape", entry(data_offsets=[0, 9]), "takes 8 bytes, and it has 9"),
    ("a beginning after the first byte", entry(data_offsets=[8, 16]), "leaves a hole before it"),
    ("an overlap", {**GOOD, "b": {**GOOD["a"], "data_offsets": [4, 12]}}, "b overlaps the one before it"),
    ("a hole", {**GOOD, "b": {**GOOD["a"], "data_offsets": [12, 20]}}, "b leaves a hole before it"),
    ("the same bytes twice", {**GOOD, "b": GOOD["a"]}, "overlaps the one before it"),
    ("data that nobody claims", {}, "take 0 bytes, and it has 8"),
    ("data beyond the end", {**GOOD, "b": {**GOOD["a"], "data_offsets": [8, 16]}}, "take 16 bytes, and it has 8"),
]


@pytest.mark.parametrize(("content", "words"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_what_is_wrong_is_said(tmp_path: Path, content: Any, words: str) -> None:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_of(text, 8))
    with pytest.raises(FormatError) as caught, open_file(path):
        pass
    message = str(caught.value)
    assert words in message
    assert "not a whole safetensors file" in message
    assert len(message) < 700 + len(str(path))


def test_the_good_one_is_read() -> None:
    entries, metadata, start = parse_header(json.dumps(GOOD).encode(), 8)
    assert entries == {"a": (torch.float32, (2,), 0, 8)}
    assert metadata == {}
    assert start == 8 + len(json.dumps(GOOD))


def test_a_huge_header_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:  # sparse
        file.write(struct.pack("<Q", header.LARGEST + 1) + b"{")
        file.truncate(header.LARGEST + 100)
    monkeypatch.setattr(header, "parse_header", lambda *_: pytest.fail("it was read"))
    with pytest.raises(FormatError, match="more than the 33,554,432 that are allowed"), open_file(path):
        pass


@pytest.mark.parametrize("where", ["a", "shape", "dtype", "data_offsets"])
def test_any_depth_is_refused(where: str) -> None:
    """Near the limit of recursion the parser still succeeds, and what comes after it may not."""
    for depth in [*range(900, 1000, 3), 5000]:
        deep = "[" * depth + "]" * depth
        table = {"a": deep} if where == "a" else entry(**{where: deep})
        text = json.dumps(table).replace(f'"{deep}"', deep).encode()
        with pytest.raises(ValueError, match=r"nested too deeply|a: "):
            parse_header(text, 8)


def test_names_are_shown_harmlessly() -> None:
    assert shown("a.lora_up.weight") == "a.lora_up.weight"
    assert shown("\x1b[2J\r\n\0ü../\u202e") == r"\x1b[2J\r\n\x00\xfc../\u202e"
    for text in ("x" * 1000, "\x1b" * 1000, "\U0001f600" * 1000):
        assert len(shown(text)) <= 200
        assert shown(text).endswith("...")
    assert shown("x" * 200) == "x" * 200


@pytest.mark.parametrize("name", ["\x1b[31mred", "../../etc/passwd", "a\nb", "\u202eevil"])
def test_a_name_of_a_damaged_tensor_cannot_reach_the_terminal(name: str) -> None:
    text = json.dumps({name: {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}).encode()
    with pytest.raises(ValueError, match="expected one of U64") as caught:
        parse_header(text, 8)
    message = str(caught.value)
    assert message.isascii()
    assert message.isprintable()


# -- against safetensors itself --------------------------------------------------------------------------------------
def is_good_for_them(data: bytes) -> bool:
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return False
    return True


def is_good_for_us(text: bytes, size: int) -> bool:
    try:
        parse_header(text, size)
    except ValueError:
        return False
    return True


NUMBERS = st.one_of(
    st.integers(0, 20),
    st.sampled_from([-1, -0.0, 1.0, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**65, True, None, "2"]),
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from([*DTYPES, "F4", "f32", "C64"]), st.none()),
        "shape": st.one_of(st.lists(NUMBERS, max_size=4), st.just(2)),
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3),
    },
    optional={"more": st.integers()},
)


@st.composite
def nearly_right(draw: st.DrawFn) -> tuple[Any, int]:
    """A header as it should be, with at most one thing changed, and the size of its data."""
    table: dict[str, Any] = {}
    at = 0
    for name in draw(st.lists(st.text(max_size=3), max_size=4, unique=True)):
        dtype = draw(st.sampled_from([*DTYPES]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        end = at + math.prod(shape) * DTYPES[dtype].itemsize
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    if draw(st.booleans()):
        table["__metadata__"] = draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
    if table and draw(st.booleans()):
        name = draw(st.sampled_from(sorted(table)))
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "all", "size"]))
        if field == "size":
            at += draw(st.sampled_from([-1, 1, 8]))
        elif field == "all":
            table[name] = draw(ENTRIES)
        elif name != "__metadata__":
            table[name][field] = draw(ENTRIES)[field]
    return table, max(at, 0)


@given(nearly_right(), st.booleans())
@example(({}, 0), False)
@example((GOOD, 8), True)
def test_nothing_passes_that_safetensors_refuses(given_: tuple[Any, int], ascii_only: bool) -> None:
    table, size = given_
    text = json.dumps(table, ensure_ascii=ascii_only).encode()
    ours, theirs = is_good_for_us(text, size), is_good_for_them(file_of(text, size))
    event(f"ours {ours}, theirs {theirs}")
    assert theirs or not ours


@given(st.dictionaries(st.text(max_size=2), ENTRIES, max_size=3), st.integers(0, 30))
def test_nothing_wild_passes_that_safetensors_refuses(table: Any, size: int) -> None:
    text = json.dumps(table).encode()
    assert not is_good_for_us(text, size) or is_good_for_them(file_of(text, size))


@given(st.binary(max_size=60), st.integers(0, 8))
def test_any_bytes_are_read_or_refused(text: bytes, size: int) -> None:
    assert not is_good_for_us(text, size) or is_good_for_them(file_of(text, size))


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(lambda key: key != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 3), max_size=3).map(tuple), st.sampled_from([*DTYPES.values()])),
        max_size=5,
    ),
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), st.text(max_size=6), max_size=3),
)
def test_what_is_written_is_safetensors_own_layout(
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], metadata: dict[str, str]
) -> None:
    """The same bytes, but for the order of the metadata, which safetensors leaves to chance."""
    entries = place(((key, *facts) for key, facts in tensors.items()), "f")
    text = render_header(entries, metadata, "f")
    found = parse_header(text[8:], sum(e.end - e.begin for e in entries.values()))
    assert (found.entries, found.metadata, found.start) == (entries, metadata, len(text))
    theirs = safetensors.torch.save({k: torch.zeros(s, dtype=d) for k, (s, d) in tensors.items()}, metadata)
    if not tensors and not metadata:  # for nothing at all safetensors 0.8 writes JSON that it refuses itself
        return
    if len(metadata) < 2:
        assert text == theirs[: len(text)]
    assert len(text) == 8 + struct.unpack("<Q", theirs[:8])[0]
    assert [k for k in json.loads(theirs[8 : len(text)]) if k != "__metadata__"] == list(entries)


@pytest.mark.parametrize(
    ("key", "words"), [("__metadata__", "cannot be the name"), ("\ud800", "cannot be the name"), ("\x1b", r"\\x1b is")]
)
def test_names_that_cannot_be_written(key: str, words: str) -> None:
    dtype = torch.complex64 if key == "\x1b" else torch.float32
    with pytest.raises(FormatError, match=words):
        place([(key, (1,), dtype)], "f")


@pytest.mark.parametrize("metadata", [{"a": 1}, {1: "a"}, {"a": "\ud800"}, {"a": None}])
def test_metadata_that_cannot_be_written(metadata: Any) -> None:
    with pytest.raises(FormatError, match="metadata is text to text"):
        render_header({}, metadata, "f")


def test_a_header_that_nobody_could_read_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "LARGEST", 1000)
    assert render_header({}, {"a": "b" * 900}, "f")
    with pytest.raises(FormatError, match="write fewer tensors or less metadata"):
        render_header({}, {"a": "b" * 1000}, "f")
