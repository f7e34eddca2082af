"""The judge reads the digits of real pictures in every style, and the colours tell the styles apart."""

from __future__ import annotations

import pytest
import torch

from nerine.errors import OptionError
from nerine.tiny import Judge, colour_distance, style_set
from nerine.tiny.judge import WEIGHTS


@pytest.mark.parametrize("style", ["plain", "neon", "paper"])
def test_the_judge_reads_pictures_that_it_was_not_trained_on(style: str) -> None:
    held_out = style_set(style).held_out
    assert Judge().accuracy(held_out.pictures, held_out.digits, style) >= 0.97


def test_the_judge_reports_its_accuracy_and_is_small() -> None:
    assert 0.98 <= Judge().real_accuracy <= 1
    assert WEIGHTS.stat().st_size < 100_000


def test_wrong_digits_are_counted_as_wrong() -> None:
    held_out = style_set("plain").held_out
    assert Judge().accuracy(held_out.pictures, (held_out.digits + 1) % 10) <= 0.03


def test_read_gives_one_digit_a_picture() -> None:
    digits = Judge().read(style_set("neon").held_out.pictures[:3], "neon")
    assert digits.shape == (3,)
    assert digits.dtype == torch.int64


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(OptionError, match="'chrome'"):
        Judge().read(torch.zeros(1, 3, 16, 16), "chrome")


def test_colour_distance_tells_styles_apart() -> None:
    neon, plain = style_set("neon"), style_set("plain")
    assert colour_distance(neon.train.pictures, neon.train.pictures) == 0
    same = colour_distance(neon.train.pictures, neon.held_out.pictures)
    other = colour_distance(neon.train.pictures, plain.train.pictures)
    assert same < 0.05 < 0.15 < other
