"""Single pictures: measured without being decoded, damaged ones named, and the process's warnings left alone."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from nerine.errors import FormatError
from nerine.train.batch import Frame
from nerine.train.data.pictures import measure, read_picture

TURNED = 6


def made(file: Path, size: tuple[int, int] = (20, 12), **more: Any) -> Path:
    levels = numpy.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8)
    Image.fromarray(levels).save(file, **more)
    return file


def exif() -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = TURNED
    return found


def whole(size: tuple[int, int]) -> Frame:
    return Frame(size, (0, 0), size)


def chunks(raw: bytes) -> list[bytes]:
    """The chunks of a PNG, each with its length and sum."""
    found, place = [], 8
    while place < len(raw):
        end = place + 12 + int.from_bytes(raw[place : place + 4], "big")
        found.append(raw[place:end])
        place = end
    return found


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def test_measuring_does_not_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, turned = made(tmp_path / "a.png"), made(tmp_path / "b.png", exif=exif())

    def never(*_: Any) -> Any:
        raise AssertionError("decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", never)
    assert measure(plain) == (20, 12)
    assert measure(turned) == (12, 20)


@pytest.mark.parametrize("where", ["in front", "behind"])
def test_orientation_is_found_on_both_sides_of_the_pixels(tmp_path: Path, where: str) -> None:
    raw = made(tmp_path / "a.png").read_bytes()
    parts, told = chunks(raw), chunk(b"eXIf", exif().tobytes().removeprefix(b"Exif\0\0"))
    parts.insert(1 if where == "in front" else -1, told)
    file = tmp_path / "b.png"
    file.write_bytes(raw[:8] + b"".join(parts))
    assert measure(file) == (12, 20)
    assert read_picture(file, whole((12, 20))).shape == (3, 20, 12)


@pytest.mark.parametrize("left", [60, 400, 700])
def test_a_png_without_its_end_is_refused(tmp_path: Path, left: int) -> None:
    file = made(tmp_path / "a.png")
    raw = file.read_bytes()
    assert len(raw) > 700
    file.write_bytes(raw[:left])
    with pytest.raises(FormatError, match=r"a\.png"):
        measure(file)


def test_reading_leaves_the_filters_of_warnings_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = made(tmp_path / "a.png")

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the filters are the whole process's, and pictures are read in threads")

    monkeypatch.setattr(warnings, "catch_warnings", never)
    monkeypatch.setattr(warnings, "simplefilter", never)
    monkeypatch.setattr(warnings, "filterwarnings", never)
    assert read_picture(file, whole((20, 12))).shape == (3, 12, 20)


def test_measuring_puts_the_filters_back_and_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = made(tmp_path / "a.png", (40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        with pytest.raises(FormatError, match=r"a\.png: 40 x 40 pixels, expected at most 1000; make it smaller"):
            measure(file)
        assert list(warnings.filters) == before
    assert told == []


def test_no_limit_of_pixels_is_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert measure(made(tmp_path / "a.png", (40, 40))) == (40, 40)


@pytest.mark.parametrize(
    "error", [struct.error("unpack"), IndexError("out of range"), EOFError("no more"), KeyError(7)]
)
def test_whatever_a_damaged_picture_raises_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    file = made(tmp_path / "a.png")

    def stumble(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(ImageOps, "exif_transpose", stumble)
    with pytest.raises(FormatError, match=r"a\.png: the picture cannot be read"):
        read_picture(file, whole((20, 12)))


def test_a_picture_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"gone\.png: the picture cannot be read"):
        measure(tmp_path / "gone.png")
