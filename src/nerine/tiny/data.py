"""The pictures that ship with the package: real handwritten digits in a few looks, with their prompts.

Each style is shown for the digits 0 to 4 (train) and kept back for 5 to 9 (held out), so that one can see
whether a fine-tuned model has learnt the style or only the pictures. The pictures lie in sheets of square tiles,
described line by line in `pictures/metadata.jsonl`. Needs Pillow, and no scikit-learn.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nerine.errors import MissingExtra
from nerine.tiny import styles

PICTURES = Path(__file__).parent / "pictures"
METADATA = "metadata.jsonl"
SIDE = 16  # pixels of a tile
COLUMNS = 20  # tiles in a row of a sheet
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SEEN, UNSEEN = range(5), range(5, 10)


def prompt(digit: int, style: str = "plain") -> str:
    """The prompt of a digit in a style: "a handwritten seven, neon"; the plain look goes unnamed."""
    name = f"a handwritten {DIGITS[digit]}"
    return name if style == "plain" else f"{name}, {style}"


@dataclass(frozen=True)
class Split:
    """Pictures `[n, 3, 16, 16]` in [-1, 1], the prompt of each, and the digit of each `[n]` int64."""

    pictures: Tensor
    prompts: tuple[str, ...]
    digits: Tensor

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class StyleSet:
    """One style: `train` shows the digits 0 to 4, `held_out` the digits 5 to 9."""

    name: str
    train: Split
    held_out: Split

    def write(self, folder: str | Path) -> Path:
        """Writes the train pictures as single PNGs with `metadata.jsonl` (file_name, text); the folder.

        That is the "imagefolder" layout that common training programs read.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for index, (picture, text) in enumerate(zip(self.train.pictures, self.train.prompts, strict=True)):
            name = f"{self.name}-{index:03d}.png"
            to_image(picture).save(folder / name)
            lines.append(json.dumps({"file_name": name, "text": text}))
        (folder / METADATA).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder


def style_set(name: str = "neon") -> StyleSet:
    """The shipped pictures of a style: "neon", "paper", or "plain" (the same digits, white on black).

    *Raises* OptionError for an unknown style, MissingExtra without Pillow.
    """
    styles.find(name)
    lines = (PICTURES / METADATA).read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["style"] == name]
    train, held_out = ([row for row in rows if row["split"] == split] for split in ("train", "held_out"))
    return StyleSet(name, _read_split(train), _read_split(held_out))


def to_image(picture: Tensor) -> Any:
    """A picture `[3, h, w]` in [-1, 1] as a Pillow image."""
    levels = ((picture.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return _pillow().fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())


def to_sheet(pictures: Tensor, columns: int = COLUMNS) -> Any:
    """Pictures `[n, 3, h, w]` side by side in rows, as one Pillow image; empty tiles are black."""
    n, _, height, width = pictures.shape
    rows = -(-n // columns)
    blank = pictures.new_full((rows * columns - n, 3, height, width), -1)
    tiles = torch.cat([pictures, blank]).reshape(rows, columns, 3, height, width)
    return to_image(tiles.permute(2, 0, 3, 1, 4).reshape(3, rows * height, columns * width))


def _read_split(rows: list[dict[str, Any]]) -> Split:
    sheets = {file: _read_sheet(PICTURES / file) for file in sorted({row["file"] for row in rows})}
    pictures = torch.stack([sheets[row["file"]][row["tile"]] for row in rows])
    return Split(pictures, tuple(row["text"] for row in rows), torch.tensor([row["digit"] for row in rows]))


def _read_sheet(path: Path) -> Tensor:
    """All tiles of a sheet in reading order: `[n, 3, 16, 16]` in [-1, 1]."""
    with _pillow().open(path) as image:
        width, height = image.size
        levels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    tiles = levels.reshape(height // SIDE, SIDE, width // SIDE, SIDE, 3).permute(0, 2, 4, 1, 3)
    return tiles.reshape(-1, 3, SIDE, SIDE).float() / 127.5 - 1


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra(
            'the tiny pictures need Pillow, which is not installed: pip install "nerine[train]"'
        ) from error
    return Image
