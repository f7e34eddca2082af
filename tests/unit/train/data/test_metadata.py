"""metadata.jsonl beside pictures: what it may say, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nerine.errors import FormatError
from nerine.tiny import style_set
from picture_folders import picture, read


def test_metadata_does_not_bring_back_what_lies_too_deep(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    deep = picture(tmp_path / "7_a bird" / "deep" / "2.png")
    rows = [{"file_name": "1.png", "text": "x"}, {"file_name": "7_a bird/deep/2.png", "text": "y"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found, report = read(tmp_path)
    assert [p.file.name for p in found] == ["1.png"]
    assert report.skipped == [(str(deep), "in a folder inside of one with repeats, which is not searched")]


def test_metadata_has_the_captions(tmp_path: Path) -> None:
    style_set("neon").write(tmp_path)
    picture(tmp_path / "stray.png")
    lines = (tmp_path / "metadata.jsonl").read_text().splitlines()
    lines += ["", json.dumps({"file_name": "gone.png", "text": "x"})]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    found, report = read(tmp_path)
    assert len(found) == 200
    assert found[0].caption.endswith(", neon")
    reasons = {Path(file).name: why for file, why in report.skipped}
    assert reasons == {
        "stray.png": "not in metadata.jsonl",
        "gone.png": "in metadata.jsonl, but not there or no picture",
    }


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1: expected"),
        ('{"file_name": "1.png"}', "line 1: expected"),
        ("[1]", "line 1: expected"),
        ('{"file_name": "../1.png", "text": "x"}', "outside of the folder"),
        ('{"file_name": "/etc/passwd", "text": "x"}', "outside of the folder"),
        ('{"file_name": "1.png", "text": 5}', "line 1: expected"),
        ('{"file_name": "1.png", "text": null}', "line 1: expected"),
        ('{"file_name": 1, "text": "x"}', "line 1: expected"),
        ('{"file_name": "", "text": "x"}', "line 1: expected"),
        ('{"file_name": "1.png\\u0000", "text": "x"}', "line 1: expected"),
        ('{"file_name": "1.png", "text": "half \\ud800"}', "line 1: expected"),
        ('{"file_name": "1.png", "text": "\x1b[2J"}', r"line 1: expected .*\\x1b\[2J"),
        ("[" * 100_000, r"line 1: expected .*\[\.\.\."),
    ],
    ids=range(13),
)
def test_damaged_metadata_is_named(tmp_path: Path, line: str, words: str) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(FormatError, match=words):
        read(tmp_path)


def test_metadata_may_have_marks_and_ends_of_lines_of_its_own(tmp_path: Path) -> None:
    for name in ("1.png", "2.png", "3.png"):
        picture(tmp_path / name)
    rows = [
        {"file_name": "1.png", "text": "one\u2028two\x85three"},
        {"file_name": "2.png", "text": None, "caption": "the next that is text"},
        {"file_name": "./deep/../3.png", "prompt": "a prompt"},
    ]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "metadata.jsonl").write_bytes(text.encode("utf-8-sig"))
    found, report = read(tmp_path)
    assert [p.caption for p in found] == ["one\u2028two\x85three", "the next that is text", "a prompt"]
    assert report.skipped == []


def test_metadata_may_speak_of_links(tmp_path: Path) -> None:
    blob = picture(tmp_path / "blobs" / "one.png")
    (tmp_path / "own").mkdir()
    for name in ("1.png", "2.png"):
        (tmp_path / "own" / name).symlink_to(blob)
    rows = [{"file_name": "1.png", "text": "one"}, {"file_name": "2.png", "text": "two"}]
    (tmp_path / "own" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found, report = read(tmp_path / "own")
    assert [(p.file.name, p.caption) for p in found] == [("1.png", "one"), ("2.png", "two")]
    assert report.skipped == []


def test_metadata_must_be_utf8(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "1.png", "text": "caf\xe9"}')
    with pytest.raises(FormatError, match=r"metadata\.jsonl: it is not in UTF-8"):
        read(tmp_path)
