"""Folders in every layout, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from nerine.errors import FormatError, OptionError
from nerine.train.batch import Picture
from nerine.train.config import settings_of
from nerine.train.data.folder import DataReport, read_pictures, read_validation, split
from nerine.train.randomness import Dice
from nerine.train.settings import DataSettings, Subset
from picture_folders import picture, read


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
    assert report.without_caption == 2


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


def test_the_folder_given_itself_may_be_the_current_one_or_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "7_a bird" / "1.png")
    (tmp_path / "3_an owl").symlink_to(tmp_path / "7_a bird")
    (linked,), _ = read(tmp_path / "3_an owl")
    assert (linked.caption, linked.repeats) == ("an owl", 3)
    monkeypatch.chdir(tmp_path / "7_a bird")
    (found,), _ = read(Path("."))
    assert (found.caption, found.repeats) == ("a bird", 7)


def test_folders_with_repeats_are_not_searched_any_deeper(tmp_path: Path) -> None:
    picture(tmp_path / "7_a bird" / "1.png")
    picture(tmp_path / "7_a bird" / "deep" / "2.png")
    picture(tmp_path / "plain" / "3_no" / "3.png")
    for folder, names in ((tmp_path, ["1.png", "3.png"]), (tmp_path / "7_a bird", ["1.png"])):
        found, report = read(folder)
        assert [(p.file.name, p.repeats) for p in found] == list(zip(names, (7, 1), strict=False))
        ((file, why),) = report.skipped
        assert file == str(tmp_path / "7_a bird" / "deep" / "2.png")
        assert why == "in a folder inside of one with repeats, which is not searched"


def test_what_is_hidden_is_left_out(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    picture(tmp_path / ".thumbnails" / "1.png")
    picture(tmp_path / "deep" / ".trash" / "more" / "1.png")
    picture(tmp_path / "deep" / "._1.png")
    found, report = read(tmp_path)
    assert [p.file for p in found] == [tmp_path / "1.png"]
    assert report.skipped == []


def test_a_link_to_nowhere_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "2.png").symlink_to(tmp_path / "gone.png")
    found, report = read(tmp_path)
    assert [p.file.name for p in found] == ["1.png"]
    assert [file for file, _ in report.skipped] == [str(tmp_path / "2.png")]


def test_no_repeats_leave_out(tmp_path: Path) -> None:
    picture(tmp_path / "0_dog" / "1.png")
    picture(tmp_path / "2_cat" / "1.png")
    found, report = read(tmp_path)
    assert [(p.caption, p.repeats) for p in found] == [("cat", 2)]
    assert report.skipped == [(str(tmp_path / "0_dog" / "1.png"), "repeated 0 times")]
    with pytest.raises(OptionError, match=r"no usable picture .*repeated 0 times"):
        read(tmp_path / "0_dog")
    none = Subset(folder=tmp_path / "2_cat", repeats=0)
    with pytest.raises(OptionError, match=r"no usable picture .*repeated 0 times"):
        read_pictures(settings_of({"subset": (none,)}))
    (found_again,), _ = read_pictures(settings_of({"subset": (Subset(folder=tmp_path / "0_dog", repeats=3),)}))
    assert found_again.repeats == 3


def test_a_date_is_not_taken_for_repeats(tmp_path: Path) -> None:
    picture(tmp_path / "20240131_holiday" / "1.png")
    with pytest.raises(OptionError, match=r"20240131_holiday says .* repeated 20240131 times, expected at most 10000"):
        read(tmp_path)
    (found,), _ = read_pictures(settings_of({"subset": (Subset(folder=tmp_path, repeats=2),)}))
    assert (found.repeats, found.caption) == (2, "holiday")
    picture(tmp_path / "other" / "10000_many" / "1.png")
    (most,), _ = read(tmp_path / "other")
    assert most.repeats == 10_000
    (once,) = read_validation(tmp_path, DataSettings())[:1]  # there, repeats do not count
    assert once.repeats == 1


@pytest.mark.parametrize(
    ("prefix", "caption"),
    [("sks", "sks a dog"), ("sks,", "sks, a dog"), ("sks, ", "sks, a dog"), ("sks\n", "sks\na dog"), ("", "a dog")],
)
def test_a_prefix_is_set_apart(tmp_path: Path, prefix: str, caption: str) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "1.txt").write_text("a dog")
    picture(tmp_path / "2.png")
    (found, bare), report = read(tmp_path, prefix=prefix)
    assert (found.caption, found.prefix) == (caption, prefix)
    assert (bare.caption, bare.prefix) == (prefix, prefix)
    assert report.without_caption == 1


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
    assert all(p.regularization for p in of_class)
    assert not any(p.regularization for p in found if p.weight == 1)
    assert (report.regularization, report.unused, report.seen) == (2, 0, 12)


@pytest.mark.parametrize(("own", "of_class", "repeats"), [(5, 2, [2, 3]), (7, 3, [2, 2, 3]), (4, 3, [1, 1, 2])])
def test_an_epoch_has_just_as_many_regularization_pictures(
    tmp_path: Path, own: int, of_class: int, repeats: list[int]
) -> None:
    for n in range(own):
        picture(tmp_path / "own" / f"{n}.png")
    for n in range(of_class):
        picture(tmp_path / "class" / f"{n}.png")
    found, report = read(tmp_path / "own", regularization=tmp_path / "class")
    assert [p.repeats for p in found if p.regularization] == repeats
    assert report.seen == 2 * own


def test_of_many_regularization_pictures_only_so_many_are_used_evenly(tmp_path: Path) -> None:
    for n in range(3):
        picture(tmp_path / "own" / f"{n}.png")
    for n in range(9):
        picture(tmp_path / "class" / f"{n}.png")
    found, report = read(tmp_path / "own", regularization=tmp_path / "class", prior_weight=0.5)
    used = [(p.file.name, p.repeats, p.weight) for p in found if p.regularization]
    assert used == [("2.png", 1, 0.5), ("5.png", 1, 0.5), ("8.png", 1, 0.5)]
    assert (report.pictures, report.seen, report.regularization, report.unused) == (6, 6, 3, 6)
    assert "6 regularisation pictures are left out" in str(report)
    assert report.to_dict()["unused"] == 6


def test_repeats_of_regularization_pictures_say_their_shares(tmp_path: Path) -> None:
    for n in range(8):
        picture(tmp_path / "own" / f"{n}.png")
    picture(tmp_path / "class" / "1_a" / "1.png")
    picture(tmp_path / "class" / "3_b" / "1.png")
    found, _ = read(tmp_path / "own", regularization=tmp_path / "class")
    assert [p.repeats for p in found if p.regularization] == [2, 6]


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
    picture(tmp_path / "larger.png", (50, 41))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    found, report = read(tmp_path)
    assert [p.file.name for p in found] == ["small.png"]
    reasons = {Path(file).name: why for file, why in report.skipped}
    assert reasons["large.png"] == "40 x 40 pixels, expected at most 1000; make it smaller"
    assert "exceeds limit" in reasons["larger.png"]  # as Pillow says of more than twice as many


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


def test_what_cannot_be_validated_with_is_told(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "2.png").write_text("no picture")
    report = DataReport()
    assert len(read_validation(tmp_path, DataSettings(), report)) == 1
    assert [file for file, _ in report.skipped] == [str(tmp_path / "2.png")]


def test_regularization_pictures_are_not_validated_with(tmp_path: Path) -> None:
    own = [Picture(tmp_path / f"{n}.png", "x", (8, 8)) for n in range(20)]
    of_class = [Picture(tmp_path / f"c{n}.png", "x", (8, 8), regularization=True) for n in range(20)]
    train, held = split(own + of_class, 0.5, Dice(1))
    assert len(held) == 10
    assert not any(p.regularization for p in held)
    assert sum(p.regularization for p in train) == 20
    with pytest.raises(OptionError, match=r"validation_share 1 of 20 pictures leaves 0 to train with and 20"):
        split(own + of_class, 1.0, Dice(1))


def test_a_file_is_on_one_side_only(tmp_path: Path) -> None:
    for n in range(8):
        picture(tmp_path / f"{n}.png")
    (tmp_path / "again").symlink_to(tmp_path)
    own = [Picture(tmp_path / f"{n}.png", "x", (8, 8)) for n in range(8)]
    linked = [Picture(tmp_path / "again" / f"{n}.png", "x", (8, 8)) for n in range(8)]
    of_class = [Picture(tmp_path / f"{n}.png", "x", (8, 8), regularization=True) for n in range(8)]
    train, held = split(own + linked + of_class, 0.25, Dice(1))
    assert len({p.file.resolve() for p in held}) == 2
    assert len(held) == 4  # under both paths
    assert not {p.file.resolve() for p in train} & {p.file.resolve() for p in held}


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
