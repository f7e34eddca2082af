"""Folders in every layout, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nerine.errors import FormatError, OptionError
from nerine.tiny import style_set
from nerine.train.batch import Picture
from nerine.train.config import settings_of
from nerine.train.data.folder import read_pictures, read_validation, split
from nerine.train.randomness import Dice
from nerine.train.settings import DataSettings, Subset


def picture(file: Path, size: tuple[int, int] = (20, 12), **more: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 200, 30)).save(file, **more)
    return file


def read(folder: Path, subsets: tuple[Subset, ...] = (), **data: Any) -> tuple[list[Picture], Any]:
    given = {"data": (folder,), **data}
    return read_pictures(settings_of({**given, "subset": subsets}))


def test_a_plain_folder_has_captions_beside(tmp_path: Path) -> None:
    picture(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("a dog\n", encoding="utf-8")
    picture(tmp_path / "deep" / "a.jpg", (30, 40))
    picture(tmp_path / "c.webp")
    (tmp_path / "notes.md").write_text("no picture")
    found, report = read(tmp_path, prefix="sks, ")
    assert [(p.file.name, p.caption, p.size, p.repeats) for p in found] == [
        ("b.png", "sks, a dog", (20, 12), 1),
        ("c.webp", "sks, ", (20, 12), 1),
        ("a.jpg", "sks, ", (30, 40), 1),
    ]
    assert (report.pictures, report.seen, report.skipped) == (3, 3, [])


def test_folders_of_sd_scripts_have_repeats_and_words(tmp_path: Path) -> None:
    picture(tmp_path / "10_sks dog" / "1.png")
    picture(tmp_path / "2_cat" / "1.png")
    (tmp_path / "2_cat" / "1.txt").write_text("a grey cat")
    picture(tmp_path / "loose.png")
    found, report = read(tmp_path, caption="nothing said")
    assert {(p.file.parent.name, p.caption, p.repeats) for p in found} == {
        ("10_sks dog", "nothing said", 10),
        ("2_cat", "a grey cat", 2),
        (tmp_path.name, "nothing said", 1),
    }
    found, report = read(tmp_path)
    assert {p.caption for p in found} == {"sks dog", "a grey cat", ""}
    assert report.seen == 13
    assert report.without_caption == 1


def test_one_of_those_folders_may_be_given_itself(tmp_path: Path) -> None:
    picture(tmp_path / "7_a bird" / "1.png")
    (found,), _ = read(tmp_path / "7_a bird")
    assert (found.caption, found.repeats) == ("a bird", 7)


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
    ],
)
def test_damaged_metadata_is_named(tmp_path: Path, line: str, words: str) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(FormatError, match=words):
        read(tmp_path)


def test_subsets_have_settings_of_their_own(tmp_path: Path) -> None:
    picture(tmp_path / "dog" / "1.png")
    picture(tmp_path / "cat" / "1.png")
    own = Subset(folder=tmp_path / "cat", repeats=4, prefix="sks ", caption="cat", flip=True, keep_tokens=2)
    found, _ = read_pictures(settings_of({"data": (tmp_path / "dog",), "caption_dropout": 0.1, "subset": (own,)}))
    dog, cat = found
    assert (dog.caption, dog.repeats, dog.flip, dog.keep_tokens, dog.caption_dropout) == ("", 1, False, 0, 0.1)
    assert (cat.caption, cat.repeats, cat.flip, cat.keep_tokens, cat.caption_dropout) == ("sks cat", 4, True, 2, 0.1)


def test_regularization_is_balanced_and_weighted(tmp_path: Path) -> None:
    for n in range(6):
        picture(tmp_path / "own" / f"{n}.png")
    for n in range(2):
        picture(tmp_path / "class" / f"{n}.png")
    found, report = read(tmp_path / "own", regularization=tmp_path / "class", prior_weight=0.5)
    of_class = [p for p in found if p.weight == 0.5]
    assert [p.repeats for p in of_class] == [3, 3]
    assert report.regularization == 2
    assert report.seen == 12


def test_what_cannot_be_used_is_skipped_and_named(tmp_path: Path) -> None:
    good = picture(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("no picture at all")
    (tmp_path / "short.png").write_bytes(good.read_bytes()[:20])
    (tmp_path / "empty.jpg").write_bytes(b"")
    found, report = read(tmp_path)
    assert [p.file.name for p in found] == ["good.png"]
    assert sorted(Path(file).name for file, _ in report.skipped) == ["empty.jpg", "short.png", "text.png"]
    assert "skipped" in str(report)
    assert report.to_dict()["pictures"] == 1


def test_bombs_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "large.png", (40, 40))
    picture(tmp_path / "small.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    found, report = read(tmp_path)
    assert [p.file.name for p in found] == ["small.png"]
    assert "exceeds limit" in report.skipped[0][1]


def test_a_picture_on_its_side_is_measured_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "1.jpg", (20, 12), exif=exif)
    (found,), _ = read(tmp_path)
    assert found.size == (12, 20)


def test_captions_must_be_utf8(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(FormatError, match=r"1\.txt: the caption is not in UTF-8"):
        read(tmp_path)


@pytest.mark.parametrize(("folder", "words"), [("gone", "found nothing"), ("file", "found a file")])
def test_no_folder_is_named(tmp_path: Path, folder: str, words: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=words):
        read(tmp_path / folder)


def test_no_pictures_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("x")
    with pytest.raises(OptionError, match=r"no usable picture in .*skipped .*a\.png"):
        read(tmp_path)
    with pytest.raises(OptionError, match="no folder of pictures is given"):
        read_pictures(settings_of({}))


def test_validation_is_still(tmp_path: Path) -> None:
    picture(tmp_path / "5_a dog" / "1.png")
    (found,) = read_validation(tmp_path, DataSettings(flip=True, caption_dropout=0.5, shuffle_tags=True))
    assert (found.repeats, found.flip, found.caption_dropout, found.shuffle_tags) == (1, False, 0.0, False)


def test_a_share_is_kept_back_and_stays_when_pictures_come(tmp_path: Path) -> None:
    def made(count: int) -> list[Picture]:
        return [Picture(tmp_path / f"{n}.png", "x", (8, 8), repeats=3, flip=True) for n in range(count)]

    train, held = split(made(400), 0.1, Dice(1))
    assert len(held) == 40
    assert not {p.file for p in train} & {p.file for p in held}
    assert {p.repeats for p in held} == {1}
    more_train, more_held = split(made(500), 0.1, Dice(1))
    assert len(more_held) == 50
    assert len({p.file for p in held} & {p.file for p in more_held}) >= 34
    assert len(more_train) + len(more_held) == 500
    with pytest.raises(OptionError, match="both must have some"):
        split(made(2), 0.001, Dice(1))
