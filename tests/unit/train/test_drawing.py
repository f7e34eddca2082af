"""Sheets of pictures: every picture is seen, and no name runs into another or into a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from nerine.errors import OptionError
from nerine.tiny import load_pipeline
from nerine.train.drawing import GAP, LARGEST, LEFT, LINE, SMALLEST, AdapterFile, contact_sheet, generate
from nerine.train.families import family_of

LONG = "a prompt that is so long, and goes on for so many words, that it takes " + "many more lines than one " * 4


def pixels(file: Path) -> Any:
    return numpy.asarray(Image.open(file).convert("RGB"), dtype=int)


def plain(width: int, height: int, colour: str) -> Any:
    return Image.new("RGB", (width, height), colour)


def inked(part: Any) -> Any:
    """Which rows of pixels, and which columns, have something that is not paper."""
    marked = (part != 255).any(2)
    return marked.any(1), marked.any(0)


def test_sheets_show_pictures_of_any_size(tmp_path: Path) -> None:
    rows = [[plain(16, 16, c) for c in ("red", "blue")], [plain(900, 600, "green")] * 2]
    file = tmp_path / "s.png"
    contact_sheet(rows, [LONG, "b"], ["x", "y"], file)
    found = pixels(file)
    for colour in ((255, 0, 0), (0, 0, 255)):
        assert (found == colour).all(2).sum() == SMALLEST**2
    assert (found == (0, 128, 0)).all(2).sum() == 2 * LARGEST * LARGEST * 600 // 900


def test_sizes_between_are_left_alone(tmp_path: Path) -> None:
    contact_sheet([[plain(200, 130, "red")]], ["a"], ["b"], tmp_path / "s.png")
    assert (pixels(tmp_path / "s.png") == (255, 0, 0)).all(2).sum() == 200 * 130


def test_names_of_rows_end_before_the_next_begins(tmp_path: Path) -> None:
    """Also beside pictures that are lower than their names."""
    file = tmp_path / "s.png"
    contact_sheet([[plain(1024, 64, "red")]] * 2, [LONG, LONG], ["x"], file)
    rows, _ = inked(pixels(file)[2 * GAP + LINE :, :LEFT])
    height = len(rows) // 2
    assert rows[:height].any()
    assert not rows[height - GAP // 2 : height].any()
    assert not rows[-GAP // 2 :].any()


def test_names_of_columns_end_before_the_next_begins(tmp_path: Path) -> None:
    file = tmp_path / "s.png"
    contact_sheet([[plain(16, 16, "red")] * 2], ["a"], ["a column of a long name"] * 2, file)
    _, columns = inked(pixels(file)[: 2 * GAP + LINE, LEFT:])
    assert columns[: SMALLEST // 2].any()
    assert not columns[SMALLEST : SMALLEST + GAP].any()
    assert not columns[2 * SMALLEST + GAP :].any()


def test_short_names_are_whole(tmp_path: Path) -> None:
    """A name of a column is cut only where it does not fit."""
    for name in ("strength 0.5", "seed 1234567"):
        for file, pad in ((tmp_path / "a.png", 16), (tmp_path / "b.png", 300)):
            contact_sheet([[plain(pad, 16, "red")]], ["a"], [name], file)
        narrow, wide = (pixels(tmp_path / f)[: 2 * GAP + LINE, LEFT : LEFT + SMALLEST] for f in ("a.png", "b.png"))
        assert (narrow == wide).all()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"seeds": []}, "at least one of each"),
        ({"seeds": [1, -2]}, "seed: expected"),
        ({"strengths": [1]}, "no adapter"),
    ],
)
def test_nothing_is_drawn_before_all_is_checked(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    base = family_of(load_pipeline())
    base.draw = lambda *given, **options: pytest.fail("it was drawn")  # type: ignore[method-assign]
    with pytest.raises(OptionError, match=words):
        generate(base, ["a"], tmp_path / "p", **more)
    assert not (tmp_path / "p").exists()


def test_adapters_are_written_as_they_are_given() -> None:
    assert str(AdapterFile("a.safetensors", 0.5)) == "a.safetensors:0.5"
    assert (
        str(AdapterFile("a.safetensors", {"unet": 0.8, "text_encoder": 1})) == "a.safetensors:unet=0.8,text_encoder=1"
    )
