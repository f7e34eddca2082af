"""Folders of pictures for tests of the trainer's data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from nerine.train.batch import Picture
from nerine.train.config import settings_of
from nerine.train.data.folder import read_pictures
from nerine.train.settings import Subset


def picture(file: Path, size: tuple[int, int] = (20, 12), **more: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 200, 30)).save(file, **more)
    return file


def read(folder: Path, subsets: tuple[Subset, ...] = (), **data: Any) -> tuple[list[Picture], Any]:
    given = {"data": (folder,), **data}
    return read_pictures(settings_of({**given, "subset": subsets}))
