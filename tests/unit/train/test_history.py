"""The history of a run: what is written at once, what a kill or a resumption leaves, and which files are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from nerine.errors import FormatError
from nerine.train.history import History, spoken

ROW = {"step": 1, "loss": 0.5, "lr": 1e-4, "grad_norm": 0.3, "seconds": 0.7, "memory": 7_400_000_000}


def filled(file: Path, steps: int = 3) -> History:
    history = History(file)
    history.append({"step": 0, "validation": 0.9, "validation_ema": 0.8})
    for step in range(1, steps + 1):
        history.append({**ROW, "step": step, "loss": 1 / step})
    history.append({"step": steps, "validation": 0.4})
    return history


def test_what_is_written_is_there_at_once(tmp_path: Path) -> None:
    history = History(tmp_path / "h.jsonl")
    assert history.rows == ()
    assert not history.file.exists()
    history.append(ROW)
    assert history.file.read_bytes() == (json.dumps(ROW) + "\n").encode()  # with the file of the history still in use
    assert History(history.file).rows == (ROW,) == history.rows
    assert isinstance(History(history.file).rows[0]["memory"], int)


def test_losses_and_validations(tmp_path: Path) -> None:
    for history in (filled(tmp_path / "h.jsonl"), History(tmp_path / "h.jsonl")):
        assert history.losses() == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
        assert history.validations() == [(0, 0.9), (3, 0.4)]
        assert history.validations(ema=True) == [(0, 0.8)]
        assert history.column("lr") == [(1, 1e-4), (2, 1e-4), (3, 1e-4)]


@pytest.mark.parametrize(("value", "text"), [(math.nan, '"nan"'), (math.inf, '"inf"'), (-math.inf, '"-inf"')])
def test_what_is_not_finite_is_legal_json(value: float, text: str, tmp_path: Path) -> None:
    history = History(tmp_path / "h.jsonl")
    history.append({"step": 1, "loss": value})
    assert history.file.read_text() == f'{{"step": 1, "loss": {text}}}\n'
    for one in (history, History(history.file)):
        ((step, loss),) = one.losses()
        assert step == 1
        assert repr(loss) == repr(value)
        assert spoken(loss) == "not finite"


def test_null_is_not_finite(tmp_path: Path) -> None:
    (tmp_path / "h.jsonl").write_text('{"step": 1, "loss": null}\n')
    assert math.isnan(History(tmp_path / "h.jsonl").losses()[0][1])


def test_numbers_for_people() -> None:
    assert [spoken(0.12345), spoken(0.12345, 4), spoken(None), spoken(-math.inf)] == [
        "0.123",
        "0.1235",
        "",
        "not finite",
    ]


@pytest.mark.parametrize("step", [3, 7])
def test_rewinding_to_the_end_leaves_the_file_alone(step: int, tmp_path: Path) -> None:
    history = filled(tmp_path / "h.jsonl")
    before = (history.file.read_bytes(), history.file.stat().st_ino)
    history.rewind(step)
    assert (history.file.read_bytes(), history.file.stat().st_ino) == before


def test_rewinding_drops_what_comes_after(tmp_path: Path) -> None:
    history = filled(tmp_path / "h.jsonl")
    history.append({**ROW, "step": 4, "loss": math.nan})
    history.rewind(3)
    assert [row["step"] for row in history.rows] == [0, 1, 2, 3, 3]
    history.rewind(2)
    assert History(history.file).rows == history.rows
    assert history.losses() == [(1, 1.0), (2, 0.5)]
    assert history.validations() == [(0, 0.9)]
    history.append({**ROW, "step": 3, "loss": 0.25})
    assert History(history.file).losses() == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert [one.name for one in tmp_path.iterdir()] == ["h.jsonl"]
    history.rewind(-1)
    assert history.file.read_bytes() == b""


def test_rewinding_before_there_is_a_file(tmp_path: Path) -> None:
    history = History(tmp_path / "h.jsonl")
    history.rewind(5)
    assert not history.file.exists()


@pytest.mark.parametrize("rest", [b'{"step": 4, "lo', b'{"step": 4, "loss": 0.5}', b"\0\0\0", b"\xff"])
def test_a_line_that_was_cut_off_is_dropped(rest: bytes, tmp_path: Path) -> None:
    whole = filled(tmp_path / "h.jsonl").file.read_bytes()
    file = tmp_path / "h.jsonl"
    file.write_bytes(whole + rest)
    history = History(file)
    assert history.losses()[-1] == (3, 1 / 3)
    assert file.read_bytes() == whole + rest  # reading changes nothing
    history.append({**ROW, "step": 4})
    assert file.read_bytes().startswith(whole + b'{"step": 4, "loss": 0.5,')
    assert len(History(file).losses()) == 4
    file.write_bytes(whole + rest)
    History(file).rewind(3)
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"step": 4, "lo', "as JSON"),
        (b"", "as JSON"),
        (b"\xff\xfe", "as JSON"),
        (b"[1, 2]", r"found \[1, 2\]"),
        (b'{"loss": 0.5}', "expected a step"),
        (b'{"step": 1.5, "loss": 0.5}', r"a whole number from 0 on, found 1\.5"),
        (b'{"step": true}', "found True"),
        (b'{"step": -1}', "found -1"),
        (b'{"step": 1, "loss": "much"}', "a number for 'loss', found much"),
        (b'{"step": 1, "loss": [0.5]}', "a number for 'loss'"),
    ],
)
def test_a_damaged_line_is_an_error_with_its_number(line: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "h.jsonl"
    file.write_bytes(b'{"step": 1, "loss": 0.5}\n' + line + b'\n{"step": 3, "loss": 0.5}\n')
    with pytest.raises(FormatError, match=said) as caught:
        History(file)
    assert str(caught.value).startswith(f"{file}: line 2: ")


@pytest.mark.parametrize("row", [{"loss": 0.5}, {"step": "1"}, {"step": 1, "loss": "high"}, {"step": 1, "ok": True}])
def test_rows_that_are_none_are_not_written(row: dict, tmp_path: Path) -> None:
    history = filled(tmp_path / "h.jsonl")
    before = history.file.read_bytes()
    with pytest.raises(FormatError, match="a new row"):
        history.append(row)
    assert history.file.read_bytes() == before
    assert len(history.rows) == 5


def test_where_it_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        History(tmp_path)
    history = History(tmp_path / "none" / "h.jsonl")
    with pytest.raises(FormatError, match="cannot be written"):
        history.append(ROW)
    assert history.rows == ()
