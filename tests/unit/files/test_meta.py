"""What a file says of itself: written in full, read with patience, and newer rules refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nerine import DoRA, FormatError, LoKr, LoRA
from nerine.files.meta import SEMANTICS, read_meta, write_meta

LAYERS = {"b": LoRA(rank=4, alpha=1.0), "a.q": DoRA(LoKr(factor=4), axis="in"), "a.k": LoRA(rank=4, alpha=1.0)}


def test_round_trip() -> None:
    metadata = write_meta(LAYERS, "9.9", {"author": "me"})
    assert all(isinstance(v, str) for v in metadata.values())
    meta = read_meta(metadata, "f")
    assert meta.layers == LAYERS
    assert (meta.semantics, meta.version, meta.note) == (SEMANTICS, "9.9", "")
    assert meta.other == {"format": "pt", "author": "me"}


def test_equal_settings_are_written_once_and_in_order() -> None:
    own = json.loads(write_meta(LAYERS, "1", {})["nerine"])
    assert len(own["algorithms"]) == 2
    assert write_meta(dict(reversed(LAYERS.items())), "1", {}) == write_meta(LAYERS, "1", {})


def test_files_of_others_have_none() -> None:
    meta = read_meta({"ss_network_dim": "8"}, "f")
    assert (meta.layers, meta.note, meta.other) == ({}, "", {"ss_network_dim": "8"})


def test_newer_rules_are_refused() -> None:
    own = {"semantics": SEMANTICS + 1, "version": "7.0", "algorithms": [], "layers": {}}
    with pytest.raises(FormatError, match=r"f\.st: written by nerine 7\.0 with semantics 2, .*upgrade nerine"):
        read_meta({"nerine": json.dumps(own)}, "f.st")
    del own["version"]
    with pytest.raises(FormatError, match="of a later version"):
        read_meta({"nerine": json.dumps(own)}, "f.st")


BROKEN = [
    "",
    "null",
    "[]",
    "{",
    "5",
    '"text"',
    "{}",
    '{"semantics": null}',
    '{"semantics": "x"}',
    '{"semantics": []}',
    '{"semantics": 1e999}',
    '{"semantics": NaN}',
    "[" * 100_000,
    '{"semantics": 1}',
    '{"semantics": 1, "algorithms": 3, "layers": {}}',
    '{"semantics": 1, "algorithms": [3], "layers": {}}',
    '{"semantics": 1, "algorithms": [null], "layers": {}}',
    '{"semantics": 1, "algorithms": [{}], "layers": {}}',
    '{"semantics": 1, "algorithms": [{"algorithm": "magic"}], "layers": {}}',
    '{"semantics": 1, "algorithms": [{"algorithm": "lora", "rank": "many"}], "layers": {}}',
    '{"semantics": 1, "algorithms": [{"algorithm": "lora", "cls": 1}], "layers": {}}',
    '{"semantics": 1, "algorithms": [{"algorithm": "dora", "inner": 3}], "layers": {}}',
    '{"semantics": 1, "algorithms": [{"algorithm": "dora", "inner": {"algorithm": "dora"}}], "layers": {}}',
    '{"semantics": 1, "algorithms": [], "layers": {"a": 0}}',
    '{"semantics": 1, "algorithms": [], "layers": {"a": null}}',
    '{"semantics": 1, "algorithms": [], "layers": {"a": 1e999}}',
    '{"semantics": 1, "algorithms": [], "layers": []}',
]


@pytest.mark.parametrize("text", BROKEN, ids=lambda t: t[:60])
def test_broken_metadata_is_a_note(text: str) -> None:
    meta = read_meta({"nerine": text, "other": "1"}, "f")
    assert meta.layers == {}
    assert meta.note
    assert meta.other == {"other": "1"}


JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
OWN = st.fixed_dictionaries(
    {},
    optional={
        "semantics": JSON | st.just(1),
        "version": JSON,
        "algorithms": JSON | st.lists(st.dictionaries(st.sampled_from(["algorithm", "rank", "inner", "axis"]), JSON)),
        "layers": JSON | st.dictionaries(st.text(max_size=4), st.integers(-1, 2) | JSON),
    },
)


@given(OWN | JSON)
def test_any_metadata_is_read_noted_or_refused(own: object) -> None:
    try:
        read_meta({"nerine": json.dumps(own)}, "f")
    except FormatError as error:
        assert "upgrade nerine" in str(error)  # noqa: PT017  (most examples raise nothing)
