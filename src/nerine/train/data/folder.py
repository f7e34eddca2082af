"""Folders of pictures: what is in them, which caption each has, how often it is seen, and what cannot be used.

A folder is plain (pictures with captions in text files beside them), or has folders called `10_sks dog` in it
(sd-scripts: repeats and words), or a `metadata.jsonl`. Pictures are opened here, but not decoded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nerine.errors import FormatError, OptionError
from nerine.train.batch import Picture
from nerine.train.data.pictures import measure
from nerine.train.randomness import Dice
from nerine.train.settings import DataSettings, Subset, TrainSettings

__all__ = ["ENDINGS", "DataReport", "read_pictures", "read_validation", "split"]

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
METADATA = "metadata.jsonl"
_COUNTED = re.compile(r"(\d+)_(.*)", re.DOTALL)


@dataclass
class DataReport:
    """What was found. `pictures` is how many can be used, `seen` how many an epoch has with their repeats, `skipped`
    the files that cannot be used, with the reason, and `buckets` how many pictures each size has."""

    folders: tuple[str, ...] = ()
    pictures: int = 0
    seen: int = 0
    regularization: int = 0
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
        lines += [f"{self.held_out} held back for validation"] if self.held_out else []
        lines += [f"sizes  {sizes}"] if sizes else []
        lines += [f"{self.filled} places of an epoch are filled with pictures once more"] if self.filled else []
        lines += [f"{self.without_caption} have no caption"] if self.without_caption else []
        lines += [f"skipped  {file}: {why}" for file, why in self.skipped[:10]]
        lines += [f"skipped  {len(self.skipped) - 10} more"] if len(self.skipped) > 10 else []
        return "\n".join(lines)


def read_pictures(settings: TrainSettings) -> tuple[list[Picture], DataReport]:
    """All pictures to train with, in the order of their names.

    Regularisation pictures are repeated so that there are about as many of them in an epoch as of the others.

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
    every = own + _balanced(of_class, sum(p.repeats for p in own), data.prior_weight)
    report.regularization = len(of_class)
    _count(report, every)
    return every, report


def read_validation(folder: Path, data: DataSettings) -> list[Picture]:
    """The pictures of a folder for validation: each once, and nothing about them at random.

    Raises:
        OptionError, FormatError: as `read_pictures`.
    """
    subset, report = Subset(folder=folder), DataReport()
    found = list(_read_folder(subset, data, report))
    if not found:
        raise OptionError(_nothing([subset], report))
    return [_still(picture) for picture in found]


def split(pictures: Sequence[Picture], share: float, dice: Dice) -> tuple[list[Picture], list[Picture]]:
    """(to train with, to validate with): each picture's own name decides, so that new ones move few.

    Regularisation pictures (those with another weight) are all trained with.

    Raises:
        OptionError: one side would be empty.
    """
    own = {p.file: dice.chance("validation", p.file.name) for p in pictures if p.weight == 1}
    held = set(sorted(own, key=lambda file: (own[file], file))[: round(share * len(own))])
    train = [p for p in pictures if p.file not in held]
    if not held or not train:
        raise OptionError(
            f"validation_share {share:g} of {len(pictures)} pictures leaves {len(train)} to train with and {len(held)} "
            "to validate with; both must have some: change the share, or give a folder with validation"
        )
    return train, [_still(p) for p in pictures if p.file in held]


def _still(picture: Picture) -> Picture:
    return replace(picture, repeats=1, weight=1.0, shuffle_tags=False, caption_dropout=0.0, flip=False)


def _balanced(of_class: Sequence[Picture], wanted: int, weight: float) -> list[Picture]:
    """Regularisation pictures with their weight, repeated so that they are about `wanted`."""
    seen = sum(p.repeats for p in of_class)
    times = max(1, round(wanted / seen)) if seen else 1
    return [replace(p, repeats=p.repeats * times, weight=weight) for p in of_class]


def _count(report: DataReport, pictures: Sequence[Picture]) -> None:
    report.pictures = len(pictures)
    report.seen = sum(p.repeats for p in pictures)
    report.without_caption = sum(not p.caption.strip() for p in pictures)


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
    seen: set[Path] = set()
    for repeats, words, file in _files(folder):
        if captions is not None and file.resolve() not in captions:
            report.skipped.append((str(file), f"not in {METADATA}"))
            continue
        seen.add(file.resolve())
        try:
            size = measure(file)
        except FormatError as error:
            report.skipped.append((str(file), str(error).removeprefix(f"{file}: ")))
            continue
        own = captions[file.resolve()] if captions is not None else _beside(file, data.caption_extension)
        yield _picture(file, size, _chosen(own, subset, data, words), repeats, subset, data)
    for file in sorted(set(captions or ()) - seen):
        report.skipped.append((str(file), f"in {METADATA}, but not there or no picture"))


def _picture(
    file: Path, size: tuple[int, int], caption: str, repeats: int, subset: Subset, data: DataSettings
) -> Picture:
    def of(name: str) -> Any:
        own = getattr(subset, name)
        return getattr(data, name) if own is None else own

    prefix = data.prefix if subset.prefix is None else subset.prefix
    return Picture(
        file=file,
        caption=prefix + caption,
        size=size,
        repeats=repeats if subset.repeats is None else subset.repeats,
        shuffle_tags=of("shuffle_tags"),
        keep_tokens=of("keep_tokens"),
        caption_dropout=of("caption_dropout"),
        flip=of("flip"),
    )


def _chosen(own: str | None, subset: Subset, data: DataSettings, words: str) -> str:
    """The caption: the picture's own, else that of the settings, else the words in the folder's name."""
    for found in (own, subset.caption, data.caption):
        if found is not None:
            return found
    return words


def _files(folder: Path) -> Iterator[tuple[int, str, Path]]:
    """(repeats, words, file) of every picture in a folder, in the order of names."""
    counted = {p: m for p in folder.iterdir() if p.is_dir() and (m := _COUNTED.fullmatch(p.name))}
    own = _COUNTED.fullmatch(folder.name)
    repeats, words = (int(own[1]), own[2].strip()) if own and not counted else (1, "")
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in ENDINGS or not path.is_file() or any(p.name.startswith(".") for p in (path,)):
            continue
        top = folder / path.relative_to(folder).parts[0]
        match = counted.get(top)
        yield (int(match[1]), match[2].strip(), path) if match else (repeats, words, path)


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


def _metadata(file: Path) -> Mapping[Path, str] | None:
    """{picture: caption} of a metadata.jsonl; None where there is none.

    Raises:
        FormatError: a line is damaged, or leaves the folder.
    """
    if not file.is_file():
        return None
    found = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
            name = row["file_name"]
            caption = next(row[key] for key in ("text", "caption", "prompt") if key in row)
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise FormatError(
                f'{where}: expected {{"file_name": "1.png", "text": "a dog"}}, found {line[:80]!r}'
            ) from error
        place = (file.parent / str(name)).resolve()
        if not place.is_relative_to(file.parent.resolve()):
            raise FormatError(f"{where}: {name!r} is outside of the folder")
        found[place] = str(caption)
    return found
