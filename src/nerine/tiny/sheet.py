"""A labelled grid of pictures as a PNG, for people to look at. Needs Pillow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nerine.tiny.data import to_image

__all__ = ["grid"]

_ZOOM, _GAP, _LEFT, _TOP = 6, 6, 96, 64
_PAPER, _INK, _SOFT = (255, 255, 255), (20, 20, 30), (110, 110, 125)


def grid(rows: Mapping[str, Tensor], columns: Sequence[str], file: Path, title: str) -> None:
    """Write the `rows` (label: pictures `[n, 3, h, w]` in [-1, 1]) under their prompts to `file`."""
    from PIL import Image, ImageDraw, ImageFont

    first = next(iter(rows.values()))
    step = first.shape[-1] * _ZOOM + _GAP
    size = (_LEFT + len(columns) * step + _GAP, _TOP + len(rows) * step + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(18), ImageFont.load_default(13)
    pen.text((_GAP * 2, 8), title, fill=_INK, font=small)
    _heads(pen, columns, step, small)
    for row, (label, pictures) in enumerate(rows.items()):
        top = _TOP + row * step
        pen.text((_GAP * 2, top + step // 2 - 14), label, fill=_INK, font=large)
        for column, picture in enumerate(pictures):
            tile = to_image(picture)
            tile = tile.resize((tile.width * _ZOOM, tile.height * _ZOOM), Image.Resampling.BICUBIC)
            sheet.paste(tile, (_LEFT + column * step, top))
    sheet.save(file)


def _heads(pen: Any, columns: Sequence[str], step: int, font: Any) -> None:
    """Each prompt once, over the columns that it stands for."""
    start = 0
    while start < len(columns):
        end = start
        while end < len(columns) and columns[end] == columns[start]:
            end += 1
        pen.text((_LEFT + start * step, _TOP - 24), columns[start], fill=_SOFT, font=font)
        start = end
