"""Headers that lie: everything that safetensors refuses is refused, before anything is allocated."""

from __future__ import annotations

import io
import json
import struct
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nerine.files.header import LARGEST, Bad, read_header


def file_of(header: Any, data: int = 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\1" * data


def read(content: bytes) -> Any:
    return read_header(io.BytesIO(content), len(content))


def one(**changed: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changed}}


def test_what_is_well_formed() -> None:
    entries, metadata = read(file_of({**one(), "__metadata__": {"k": "v"}}))
    assert metadata == {"k": "v"}
    (entry,) = entries.values()
    assert (entry.dtype, entry.shape, entry.stop - entry.start) == (torch.float32, (2,), 8)


LIES = {
    "a size that is not that of the shape": (one(shape=[3]), "has 8 bytes for a shape"),
    "a size that overflows": (one(shape=[2**32, 2**32]), "has 8 bytes for a shape"),
    "a shape that overflows to the size": (one(shape=[2**62, 4, 2]), "has 8 bytes for a shape"),
    "a number above all": (one(shape=[2**64]), "whole numbers"),
    "a negative size": (one(shape=[-2]), "whole numbers"),
    "true for one": (one(dtype="F64", shape=[True]), "whole numbers"),
    "a half": (one(shape=[2.0]), "whole numbers"),
    "shapes in shapes": (one(shape=[[2]]), "whole numbers"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, "not described by"),
    "more than is known": (one(strides=[1]), "not described by"),
    "a place before the start": (one(data_offsets=[-8, 0]), "whole numbers"),
    "a place the wrong way round": (one(data_offsets=[8, 0]), "has -8 bytes"),
    "a place past the end": (one(data_offsets=[8, 16]), "begins at byte"),
    "three places": (one(data_offsets=[0, 4, 8]), "whole numbers"),
    "a format that is none": (one(dtype="F99"), "has the format F99"),
    "a format that is no word": (one(dtype=["F32"]), "has the format"),
    "tensors over each other": ({**one(), "b": one()["a"]}, "begins at byte"),
    "a hole": (
        {**one(shape=[1], data_offsets=[0, 4]), "b": one(shape=[0], data_offsets=[8, 8])["a"]},
        "begins at byte",
    ),
    "data left over": (one(shape=[1], data_offsets=[0, 4]), "its tensors end at byte"),
    "metadata of numbers": ({**one(), "__metadata__": {"k": 1}}, "not text by name"),
    "metadata that is a list": ({**one(), "__metadata__": []}, "not text by name"),
    "a list": ([1], "no JSON object"),
    "nothing": (b"", "no JSON"),
    "nesting": (b'{"a":' + b"[" * 100_000, "no JSON"),
    "the same name twice": (b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"a":1}', "the name a occurs twice"),
    "a name of the same kind twice": (b'{"a":{"dtype":"U8","dtype":"U8","shape":[8],"data_offsets":[0,8]}}', "twice"),
    "bytes that are no text": (b'{"\xff":1}', "no JSON"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies(lie: str) -> None:
    header, words = LIES[lie]
    with pytest.raises(Bad, match=words):
        read(file_of(header))


def test_a_header_too_large_to_be_read() -> None:
    content = struct.pack("<Q", LARGEST + 1) + b" " * (LARGEST + 1)
    with pytest.raises(Bad, match="its header would have"):
        read(content)


def test_names_are_shown_without_what_a_terminal_would_obey() -> None:
    with pytest.raises(Bad) as caught:
        read(file_of({"\x1b[2Jevil\n" + "x" * 500: one()["a"], "b": 1}))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


shapes = st.lists(st.integers(0, 3))
sizes = st.one_of(st.integers(-2, 9), st.sampled_from([2**31, 2**63, 2**64]))
entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F16", "BOOL", "F8_E4M3", "I64", "X"]),
        "shape": st.lists(sizes, max_size=3),
        "data_offsets": st.lists(st.integers(0, 16), min_size=2, max_size=2),
    }
)


@settings(max_examples=400)
@given(st.dictionaries(st.text(max_size=3), entry, max_size=3), st.integers(0, 16))
def test_what_safetensors_refuses_is_refused(header: dict[str, Any], data: int) -> None:
    content = file_of(header, data)
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError:
        with pytest.raises(Bad):
            read(content)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.sampled_from(["F32", "U8", "F16", "BF16", "I64"]), st.lists(st.integers(0, 3))), max_size=5)
)
def test_what_safetensors_writes_is_read(tensors: list[tuple[str, list[int]]]) -> None:
    header, at = {}, 0
    for i, (dtype, shape) in enumerate(tensors):
        size = {"F32": 4, "U8": 1, "F16": 2, "BF16": 2, "I64": 8}[dtype] * torch.Size(shape).numel()
        header[f"t{i}"] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    content = file_of(header, at)
    assert {name for name, _ in safetensors.deserialize(content)} == set(read(content)[0])
