"""The shipped pictures: complete, disjoint, honest about their licence, and read without scikit-learn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nerine.errors import MissingExtra, NerineError, OptionError
from nerine.tiny import StyleSet, prompt, style_set, styles
from nerine.tiny.data import METADATA, PICTURES, SEEN, UNSEEN

STYLES = tuple(styles.STYLES)


@pytest.fixture(scope="module", params=STYLES)
def shipped(request: pytest.FixtureRequest) -> StyleSet:
    return style_set(request.param)


def test_pictures_and_prompts_belong_together(shipped: StyleSet) -> None:
    for split in (shipped.train, shipped.held_out):
        assert split.pictures.shape == (len(split), 3, 16, 16)
        assert split.pictures.dtype == torch.float32
        assert -1 <= split.pictures.min() < split.pictures.max() <= 1
        assert split.prompts == tuple(prompt(digit, shipped.name) for digit in split.digits.tolist())


def test_the_style_is_shown_for_some_digits_only(shipped: StyleSet) -> None:
    assert set(shipped.train.digits.tolist()) == set(SEEN)
    assert set(shipped.held_out.digits.tolist()) == set(UNSEEN)
    assert len(shipped.train) == 200
    assert len(shipped.held_out) == 160


def test_no_picture_is_in_both_splits() -> None:
    rows = [json.loads(line) for line in (PICTURES / METADATA).read_text(encoding="utf-8").splitlines()]
    sources: dict[str, set[int]] = {"train": set(), "held_out": set()}
    for row in rows:
        sources[row["split"]].add(row["source"])
    train, held_out = sources["train"], sources["held_out"]
    assert train
    assert held_out
    assert not train & held_out


def test_the_styles_show_the_same_strokes() -> None:
    plain = styles.read(style_set("plain").train.pictures, "plain")
    for name in STYLES:
        strokes = styles.read(style_set(name).train.pictures, name)
        torch.testing.assert_close(strokes, plain, atol=0.15, rtol=0)
        assert (strokes - plain).abs().mean() < 0.02


def test_drawing_and_reading_undo_each_other() -> None:
    strokes = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for name in ("plain", "paper"):
        torch.testing.assert_close(styles.read(styles.draw(strokes, name), name), strokes)


def test_prompts() -> None:
    assert prompt(7) == "a handwritten seven"
    assert prompt(7, "neon") == "a handwritten seven, neon"


def test_the_licence_lies_beside_the_pictures_and_they_are_small() -> None:
    assert "CC BY 4.0" in (PICTURES / "LICENSE.md").read_text(encoding="utf-8")
    assert sum(file.stat().st_size for file in PICTURES.iterdir()) < 2_000_000


def test_an_unknown_style_is_named_with_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"plain, neon, paper.*'chrome'"):
        style_set("chrome")


def test_write_makes_an_image_folder(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    shipped = style_set("neon")
    folder = shipped.write(tmp_path / "neon")
    rows = [json.loads(line) for line in (folder / METADATA).read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == list(shipped.train.prompts)
    with image.open(folder / rows[3]["file_name"]) as picture:
        levels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(16, 16, 3)
    torch.testing.assert_close(levels.permute(2, 0, 1) / 127.5 - 1, shipped.train.pictures[3])


def test_without_pillow_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtra, match=r'pip install "nerine\[train\]"') as caught:
        style_set("neon")
    assert isinstance(caught.value, NerineError)
    assert isinstance(caught.value, ImportError)


def test_importing_the_package_is_cheap() -> None:
    heavy = ("diffusers", "transformers", "PIL", "sklearn", "matplotlib")
    code = f"import sys, nerine.tiny; print([name for name in {heavy} if name in sys.modules])"
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
