"""Folders of pictures: what is in them, which caption each has, how often it is seen, and what cannot be used.

A folder is plain (pictures with captions in text files beside them), or has folders called `10_sks dog` in it
(sd-scripts: repeats and words), or a `metadata.jsonl`. Pictures are opened here, but not decoded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nerine.errors import FormatError, OptionError, shown
from nerine.train.batch import Picture
from nerine.train.data.captions import prefixed
from nerine.train.data.pictures import measure
from nerine.train.randomness import Dice
from nerine.train.settings import DataSettings, Subset, TrainSettings

__all__ = ["ENDINGS", "DataReport", "read_pictures", "read_validation", "split"]

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
METADATA = "metadata.jsonl"
MOST_REPEATS = 10_000  # of what a folder's name may say: 20240101_holiday is a date
_COUNTED = re.compile(r"(\d+)_(.*)", re.DOTALL)


@dataclass
class DataReport:
    """What was found. `pictures` is how many are used, `seen` how many an epoch has with their repeats, `unused` how
    many regularisation pictures are more than there are others, `without_caption` how many have nothing but a prefix,
    `skipped` the files that cannot be used, with the reason, and `buckets` how many pictures each size has."""

    folders: tuple[str, ...] = ()
    pictures: int = 0
    seen: int = 0
    regularization: int = 0
    unused: int = 0
    held_out: int = 0
    without_caption: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    buckets: dict[str, int] = field(default_factory=dict)
    filled: int = 0  # places in an epoch's batches that hold a picture once more, for want of others of its size

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __str__(self) -> str:
        sizes = ", ".join(f"{size}: {count}" for size, count in self.buckets.items())
        lines = [f"{self.pictures} pictures in {', '.join(self.folders)}, {self.seen} in an epoch"]
        lines += [f"{self.regularization} of them for regularisation"] if self.regularization else []
        lines += [f"{self.unused} regularisation pictures are left out: there are fewer others"] if self.unused else []
        lines += [f"{self.held_out} held back for validation"] if self.held_out else []
        lines += [f"sizes  {sizes}"] if sizes else []
        lines += [f"{self.filled} places of an epoch are filled with pictures once more"] if self.filled else []
        lines += [f"{self.without_caption} have no caption"] if self.without_caption else []
        lines += [f"skipped  {file}: {why}" for file, why in self.skipped[:10]]
        lines += [f"skipped  {len(self.skipped) - 10} more"] if len(self.skipped) > 10 else []
        return "\n".join(lines)


def read_pictures(settings: TrainSettings) -> tuple[list[Picture], DataReport]:
    """All pictures to train with, in the order of their names.

    An epoch has as many regularisation pictures as others, as in sd-scripts: few of them are repeated, and of many
    only so many are used, evenly from all of them.

    Raises:
        OptionError: a folder is not there, or nothing in it can be used.
        FormatError: a metadata.jsonl is damaged.
    """
    data = settings.data
    subsets = [Subset(folder=folder) for folder in data.data] + list(settings.subsets)
    if data.regularization is not None:
        subsets.append(Subset(folder=data.regularization, regularization=True))
    if not any(not subset.regularization for subset in subsets):
        raise OptionError("data: no folder of pictures is given, as in --data pictures")
    report = DataReport(folders=tuple(str(subset.folder) for subset in subsets))
    own: list[Picture] = []
    of_class: list[Picture] = []
    for subset in subsets:
        found = list(_read_folder(subset, data, report))
        (of_class if subset.regularization else own).extend(found)
    if not own:
        raise OptionError(_nothing(subsets, report))
    used = _balanced(of_class, sum(p.repeats for p in own))
    report.pictures = len(own) + len(used)
    report.seen = sum(p.repeats for p in own + used)
    report.regularization, report.unused = len(used), len(of_class) - len(used)
    return own + used, report


def read_validation(folder: Path, data: DataSettings, report: DataReport | None = None) -> list[Picture]:
    """The pictures of a folder for validation: each once, and nothing about them at random. What cannot be used is
    added to `report`.

    Raises:
        OptionError, FormatError: as `read_pictures`.
    """
    subset, report = Subset(folder=folder, repeats=1), DataReport() if report is None else report
    found = list(_read_folder(subset, data, report))
    if not found:
        raise OptionError(_nothing([subset], report))
    return [_still(picture) for picture in found]


def split(pictures: Sequence[Picture], share: float, dice: Dice) -> tuple[list[Picture], list[Picture]]:
    """(to train with, to validate with): each picture's own name decides, so that new ones move few.

    Regularisation pictures are not validated with. A file is on one side only, under whatever paths it is given.

    Raises:
        OptionError: one side would be empty.
    """
    place = {file: file.resolve() for file in {p.file for p in pictures}}
    chances = {place[p.file]: dice.chance("validation", p.file.name) for p in pictures if not p.regularization}
    held = set(sorted(chances, key=lambda file: (chances[file], file))[: round(share * len(chances))])
    train = [p for p in pictures if place[p.file] not in held]
    if not held or all(p.regularization for p in train):
        left = len(chances) - len(held)
        raise OptionError(
            f"validation_share {share:g} of {len(chances)} pictures leaves {left} to train with and {len(held)} "
            "to validate with; both must have some: change the share, or give a folder with validation"
        )
    return train, [_still(p) for p in pictures if place[p.file] in held and not p.regularization]


def _still(picture: Picture) -> Picture:
    return replace(picture, repeats=1, weight=1.0, shuffle_tags=False, caption_dropout=0.0, flip=False)


def _balanced(of_class: Sequence[Picture], wanted: int) -> list[Picture]:
    """Regularisation pictures, repeated or left out evenly, so that an epoch has `wanted` of them. Their own repeats
    say how often each is seen next to the others of them."""
    total, before, found = sum(p.repeats for p in of_class), 0, []
    for picture in of_class:
        after = before + picture.repeats
        repeats = after * wanted // total - before * wanted // total
        found += [replace(picture, repeats=repeats)] if repeats else []
        before = after
    return found


def _nothing(subsets: Sequence[Subset], report: DataReport) -> str:
    where = ", ".join(str(subset.folder) for subset in subsets)
    skipped = "".join(f"; skipped {file}: {why}" for file, why in report.skipped[:3])
    return f"data: no usable picture in {where}; expected files ending in {', '.join(ENDINGS)}{skipped}"


# -- one folder --------------------------------------------------------------------------------------------------------
def _read_folder(subset: Subset, data: DataSettings, report: DataReport) -> Iterator[Picture]:
    folder = subset.folder
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise OptionError(f"data: expected a folder of pictures at {folder}, found {found}")
    captions = _metadata(folder / METADATA)
    seen: set[str] = set()
    for repeats, words, file in _files(folder, report):
        place = os.path.abspath(file)
        if captions is not None and place not in captions:
            report.skipped.append((str(file), f"not in {METADATA}"))
            continue
        seen.add(place)
        times = repeats if subset.repeats is None else subset.repeats
        if times < 1:
            report.skipped.append((str(file), "repeated 0 times"))
            continue
        try:
            size = measure(file)
        except FormatError as error:
            report.skipped.append((str(file), str(error).removeprefix(f"{file}: ")))
            continue
        own = captions[place] if captions is not None else _beside(file, data.caption_extension)
        caption = _chosen(own, subset, data, words)
        report.without_caption += not caption.strip()
        yield _picture(file, size, caption, _checked(times, file, subset), subset, data)
    seen.update(os.path.abspath(file) for file, _ in report.skipped)
    for name in sorted(set(captions or ()) - seen):
        report.skipped.append((name, f"in {METADATA}, but not there or no picture"))


def _picture(
    file: Path, size: tuple[int, int], caption: str, repeats: int, subset: Subset, data: DataSettings
) -> Picture:
    def of(name: str) -> Any:
        own = getattr(subset, name)
        return getattr(data, name) if own is None else own

    return Picture(
        file=file,
        caption=prefixed(of("prefix"), caption),
        size=size,
        repeats=repeats,
        weight=data.prior_weight if subset.regularization else 1.0,
        shuffle_tags=of("shuffle_tags"),
        keep_tokens=of("keep_tokens"),
        caption_dropout=of("caption_dropout"),
        flip=of("flip"),
        prefix=of("prefix"),
        regularization=subset.regularization,
    )


def _checked(repeats: int, file: Path, subset: Subset) -> int:
    """The repeats, if they are meant as such.

    Raises:
        OptionError: the name of the folder says so many that it must mean something else.
    """
    if repeats > MOST_REPEATS and subset.repeats is None:
        raise OptionError(
            f"data: the name of {file.parent} says that each picture is repeated {repeats} times, expected at most "
            f"{MOST_REPEATS}; give the folder another name, or repeats in a [[subset]]"
        )
    return repeats


def _chosen(own: str | None, subset: Subset, data: DataSettings, words: str) -> str:
    """The caption: the picture's own, else that of the settings, else the words in the folder's name."""
    for found in (own, subset.caption, data.caption):
        if found is not None:
            return found
    return words


def _files(folder: Path, report: DataReport) -> Iterator[tuple[int, str, Path]]:
    """(repeats, words, file) of every picture in a folder, in the order of names. Folders with repeats in their names
    are looked for in `folder` alone, and what lies deeper in them is not searched."""
    counted = {p.name: m for p in folder.iterdir() if p.is_dir() and (m := _COUNTED.fullmatch(p.name))}
    own = None if counted else _COUNTED.fullmatch(Path(os.path.abspath(folder)).name)
    for path in sorted(_pictures_in(folder)):
        parts = path.relative_to(folder).parts
        match = own or (counted.get(parts[0]) if len(parts) > 1 else None)
        if match and len(parts) > (1 if own else 2):
            report.skipped.append((str(path), "in a folder inside of one with repeats, which is not searched"))
        else:
            yield (int(match[1]), match[2].strip(), path) if match else (1, "", path)


def _pictures_in(folder: Path) -> Iterator[Path]:
    """Every file in a folder, and in those in it, that is called like a picture; what is hidden is left out."""
    for above, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(ENDINGS) and not name.startswith("."):
                yield Path(above, name)


def _beside(file: Path, extension: str) -> str | None:
    """The caption in the text file beside a picture.

    Raises:
        FormatError: it is not in UTF-8.
    """
    beside = file.with_suffix(extension if extension.startswith(".") else f".{extension}")
    if not beside.is_file():
        return None
    try:
        return beside.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise FormatError(f"{beside}: the caption is not in UTF-8 ({error}); save it as UTF-8") from error


def _metadata(file: Path) -> Mapping[str, str] | None:
    """{picture: caption} of a metadata.jsonl, by absolute paths; None where there is none.

    Raises:
        FormatError: a line is damaged, or leaves the folder.
    """
    if not file.is_file():
        return None
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{file}: it is not in UTF-8 ({error}); save it as UTF-8") from error
    folder, found = Path(os.path.abspath(file.parent)), {}
    for number, line in enumerate(text.split("\n"), 1):  # other ends of lines may be in captions
        if line.strip():
            name, caption = _row(line, f"{file}, line {number}")
            place = os.path.abspath(folder / name)
            if not Path(place).is_relative_to(folder):  # as it is written: the file itself may be a link
                raise FormatError(f"{file}, line {number}: '{shown(name)}' is outside of the folder")
            found[place] = caption
    return found


def _row(line: str, where: str) -> tuple[str, str]:
    """The file's name and the caption in a line.

    Raises:
        FormatError: it has none.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    row = row if isinstance(row, dict) else {}
    name = row.get("file_name")
    caption = next((row[key] for key in ("text", "caption", "prompt") if isinstance(row.get(key), str)), None)
    if not isinstance(name, str) or not name or caption is None or not _is_text(name) or not _is_text(caption):
        expected = '{"file_name": "1.png", "text": "a dog"}'
        raise FormatError(f"{where}: expected {expected}, found '{shown(line, 80)}'")
    return name, caption


def _is_text(text: str) -> bool:
    """Whether it is text in Unicode: half a character or a zero is none."""
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)
