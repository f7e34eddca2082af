"""The curve of a run: the average that is drawn, the limits of the axis, and both pictures of it."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from nerine.errors import FormatError, MissingExtra
from nerine.train.curve import curve_svg, draw_curve, is_empty, smoothing
from nerine.train.history import History

EVIL = '</svg><script>alert(1)</script>$\\frac{$"'


def history_of(tmp_path: Path, losses: list[float], validations: dict[int, float] | None = None) -> History:
    history = History(tmp_path / "history.jsonl")
    for step, loss in enumerate(losses, 1):
        history.append({"step": step, "loss": loss, "lr": 1e-4 / step})
    for step, loss in (validations or {}).items():
        history.append({"step": step, "validation": loss, "validation_ema": loss / 2})
    return history


def elements(svg: str, name: str, class_: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(f"<all>{svg}</all>")
    return [one for one in root.iter(name) if one.get("class") == class_]


def heights(one: ElementTree.Element) -> list[float]:
    return [float(pair.split(",")[1]) for pair in str(one.get("points")).split()]


# -- the average -------------------------------------------------------------------------------------------------------
def test_the_average_is_that_of_the_formula() -> None:
    found = smoothing([(1, 4.0), (2, 2.0), (3, 1.0)])
    assert found.span == 10
    assert found.decay == 0.9
    weights = [0.81, 0.9, 1.0]
    expected = (0.81 * 4 + 0.9 * 2 + 1) / sum(weights)
    assert found.points[0] == (1, pytest.approx(4.0))  # it does not lean towards zero
    assert found.points[2] == (3, pytest.approx(expected))
    assert found.last == pytest.approx(expected)
    assert str(found) == "moving average (decay 0.900, about 10 steps)"


def test_a_constant_stays_and_long_runs_are_averaged_over_more() -> None:
    found = smoothing([(step, 0.25) for step in range(2000)])
    assert found.span == 50
    assert all(value == pytest.approx(0.25) for _, value in found.points)


def test_what_is_not_finite_is_left_out_of_it() -> None:
    found = smoothing([(1, 1.0), (2, math.nan), (3, math.inf), (4, 1.0)])
    assert [step for step, _ in found.points] == [1, 4]
    assert found.last == pytest.approx(1.0)
    assert smoothing([(1, math.nan)]).last is None


# -- on a page ---------------------------------------------------------------------------------------------------------
def test_the_page_has_losses_average_validation_and_rate(tmp_path: Path) -> None:
    svg = curve_svg(history_of(tmp_path, [1.0, 0.5, 0.25, 0.5], {0: 0.9, 4: 0.4}))
    (raw,), (average,) = elements(svg, "polyline", "line raw"), elements(svg, "polyline", "line average")
    assert len(heights(raw)) == len(heights(average)) == 4
    assert heights(raw)[0] < heights(raw)[1] < heights(raw)[2]  # down the loss, down the picture
    dots = elements(svg, "circle", "held")
    assert [dot[0].text for dot in dots] == ["step 0: 0.9", "step 4: 0.4"]
    assert len(elements(svg, "circle", "ema")) == 2
    (rate,) = elements(svg, "polyline", "line rate")
    assert heights(rate) == sorted(heights(rate))
    assert min(heights(rate)) > max(heights(raw))  # its panel lies below
    assert "decay 0.9" in svg
    assert "from step 0 to 4" in svg


def test_steps_that_are_not_finite_are_marked(tmp_path: Path) -> None:
    svg = curve_svg(history_of(tmp_path, [1.0, math.nan, 0.5, math.inf, 0.5]))
    assert len(elements(svg, "line", "broken")) == 2
    assert "not finite: 2 steps" in svg
    assert len(heights(elements(svg, "polyline", "line raw")[0])) == 3
    assert not elements(svg, "circle", "held")
    assert "nan" not in re.sub("[^a-z]+", " ", svg).split()


def test_an_outlier_does_not_squash_the_curve(tmp_path: Path) -> None:
    losses = [0.5 + 0.1 * (step % 3) for step in range(400)]
    calm = curve_svg(history_of(tmp_path, losses))
    (tmp_path / "history.jsonl").unlink()
    wild = curve_svg(history_of(tmp_path, [5.0, *losses[1:200], 5.0, *losses[201:]]))
    spans = []
    for svg in (calm, wild):
        at = heights(elements(svg, "polyline", "line raw")[0])[50:150]
        spans.append(max(at) - min(at))
    assert spans[1] > spans[0] / 5  # an axis up to 5 would leave a 22nd


@pytest.mark.parametrize(("end", "is_log"), [(0.5, False), (0.001, True)])
def test_losses_far_apart_have_a_logarithmic_axis(end: float, is_log: bool, tmp_path: Path) -> None:
    losses = [end ** (step / 300) for step in range(300)]
    assert ("logarithmic" in curve_svg(history_of(tmp_path, losses))) is is_log


def test_long_runs_are_thinned_and_keep_their_spikes(tmp_path: Path) -> None:
    losses = [0.5] * 5000
    losses[3333] = 0.9
    svg = curve_svg(history_of(tmp_path, losses, {5000: 1.0}))
    at = heights(elements(svg, "polyline", "line raw")[0])
    assert len(at) <= 1300
    assert sum(y < max(at) - 20 for y in at) == 1
    assert len(svg) < 80_000


@pytest.mark.parametrize("losses", [[], [math.nan, math.inf]])
def test_nothing_to_draw(losses: list[float], tmp_path: Path) -> None:
    history = history_of(tmp_path, losses)
    assert is_empty(history)
    assert curve_svg(history) == ""


@pytest.mark.parametrize("losses", [[0.0], [0.5], [0.5, 0.5, 0.5], [-1.0, -2.0]])
def test_odd_runs_can_be_drawn(losses: list[float], tmp_path: Path) -> None:
    svg = curve_svg(history_of(tmp_path, losses))
    assert all(0 < y < 400 for y in heights(elements(svg, "polyline", "line average")[0]))


# -- as a picture ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("losses", [[1.0, 0.5, math.nan, 0.25], [0.9 ** (step / 2) for step in range(200)], [0.5]])
def test_the_picture(losses: list[float], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (extra: plots)")
    image = pytest.importorskip("PIL.Image", reason="reads the picture")
    draw_curve(history_of(tmp_path, losses, {0: 0.9, 2: 0.4}), tmp_path / "loss.png", EVIL)
    with image.open(tmp_path / "loss.png") as picture:
        assert picture.format == "PNG"
        assert picture.size == (1600, 1000)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert (0xB9, 0x7A, 0x1F) in colours  # of the validation
    assert ((0xB3, 0x40, 0x2A) in colours) is (not all(map(math.isfinite, losses)))


def test_a_picture_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (extra: plots)")
    with pytest.raises(FormatError, match="steps with a finite loss"):
        draw_curve(history_of(tmp_path, [math.nan]), tmp_path / "loss.png", "x")
    assert not (tmp_path / "loss.png").exists()


def test_the_picture_needs_matplotlib(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(MissingExtra, match=r"nerine\[plots\]"):
        draw_curve(history_of(tmp_path, [0.5]), tmp_path / "loss.png", "x")
    assert not (tmp_path / "loss.png").exists()
