"""Drawing with adapters: prompts to pictures, and sheets of pictures that are compared at a glance."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nerine.api import load
from nerine.errors import FormatError, OptionError
from nerine.files.atomic import replacing
from nerine.model.network import Network
from nerine.model.strengths import Strength
from nerine.tables import listing
from nerine.train.families import Base

__all__ = ["AdapterFile", "DrawingReport", "contact_sheet", "generate", "put_on"]

Progress = Callable[[int, int, str], None]
SMALLEST, LARGEST = 96, 384  # pixels of a picture in a sheet
GAP, LINE = 8, 15  # pixels between pictures, and of a line of text
_INK, _SOFT, _PAPER = (20, 20, 30), (110, 110, 125), (255, 255, 255)


@dataclass(frozen=True)
class AdapterFile:
    """A file, and the strength or strengths (by pattern) at which it counts."""

    file: str
    strength: Strength = 1.0


@dataclass(frozen=True, kw_only=True)
class DrawingReport:
    """What was drawn: the files, and for each picture its prompt, seed and strength."""

    files: tuple[str, ...]
    pictures: tuple[Mapping[str, Any], ...]
    seconds: float
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        return {"files": list(self.files), "pictures": [dict(p) for p in self.pictures], "seconds": self.seconds}

    def __str__(self) -> str:
        rows = [("pictures", f"{len(self.pictures)} in {self.seconds:.1f} s"), *(("file", file) for file in self.files)]
        return "\n".join([listing(rows), *self.notes])


def put_on(base: Base, adapters: Sequence[AdapterFile]) -> list[Network]:
    """Load the adapters into the base's pipeline, ready to draw.

    Raises:
        FormatError, ShapeError, OptionError: as `nerine.load`.
    """
    found = []
    for number, one in enumerate(adapters):
        network = load(base.pipeline, one.file, strength=one.strength, name=f"adapter{number}")
        network.requires_grad_(False).eval()
        found.append(network)
    return found


def generate(
    base: Base,
    prompts: Sequence[str],
    out: Path,
    *,
    networks: Sequence[Network] = (),
    strengths: Sequence[float] = (),
    seeds: Sequence[int] = (0,),
    progress: Progress | None = None,
    **drawing: Any,
) -> DrawingReport:
    """Draw every prompt with every seed, and with `strengths` at each of these (which multiply those of the adapters).

    `out` is a folder for single pictures, or a .png for one sheet: a row for each prompt (and seed), a column for each
    strength, or for each seed. `drawing` is handed to `Base.draw`: negative, steps, guidance, size.

    Raises:
        OptionError: there is nothing to draw, or strengths without adapters.
    """
    if not prompts:
        raise OptionError("prompts: expected at least one")
    if strengths and not networks:
        raise OptionError("strengths: there is no adapter whose strength could be changed")
    began, done = time.monotonic(), 0
    own = [[adapter.strength for *_, adapter in network.adapters()] for network in networks]
    drawn: dict[tuple[int, int, float], Any] = {}
    levels = list(strengths) or [1.0]
    try:
        for level in levels:
            _scale(networks, own, level)
            for seed in seeds:
                for number, prompt in enumerate(prompts):
                    drawn[number, seed, level] = base.draw([prompt], seeds=[seed], **drawing)[0]
                    done += 1
                    if progress is not None:
                        progress(done, len(levels) * len(seeds) * len(prompts), prompt)
    finally:
        _scale(networks, own, 1.0)
    shown = tuple({"prompt": prompts[n], "seed": seed, "strength": level} for n, seed, level in drawn)
    if out.suffix.lower() == ".png":
        files = [_sheet(drawn, prompts, seeds, levels, out)]
    else:
        files = [_single(drawn[key], out, facts, drawing) for key, facts in zip(drawn, shown, strict=True)]
    return DrawingReport(files=tuple(map(str, files)), pictures=shown, seconds=time.monotonic() - began)


def _scale(networks: Sequence[Network], own: Sequence[Sequence[float]], level: float) -> None:
    for network, strengths in zip(networks, own, strict=True):
        for (*_, adapter), strength in zip(network.adapters(), strengths, strict=True):
            adapter.strength = strength * level


def _single(picture: Any, folder: Path, facts: Mapping[str, Any], drawing: Mapping[str, Any]) -> Path:
    """One PNG, with what it was drawn from in its text."""
    from PIL.PngImagePlugin import PngInfo

    folder.mkdir(parents=True, exist_ok=True)
    words = "".join(c if c.isalnum() else "-" for c in facts["prompt"].lower())[:40].strip("-") or "picture"
    file = folder / f"{words}-{facts['seed']}-{facts['strength']:g}.png"
    if file.exists():
        raise FormatError(f"{file}: there is such a file already; choose another --out")
    info = PngInfo()
    for key, value in {**facts, **drawing}.items():
        info.add_text(key, str(value))
    with replacing(file) as out:
        picture.save(out, format="PNG", pnginfo=info)
    return file


def _sheet(
    drawn: Mapping[tuple[int, int, float], Any],
    prompts: Sequence[str],
    seeds: Sequence[int],
    levels: Sequence[float],
    file: Path,
) -> Path:
    by_strength = len(levels) > 1
    if by_strength:
        columns = [f"strength {level:g}" for level in levels]
        keys = [[(n, seed, level) for level in levels] for n in range(len(prompts)) for seed in seeds]
        several = len(seeds) > 1
        rows = [f"{prompt}\nseed {seed}" if several else prompt for prompt in prompts for seed in seeds]
    else:
        columns = [f"seed {seed}" for seed in seeds]
        keys = [[(n, seed, levels[0]) for seed in seeds] for n in range(len(prompts))]
        rows = list(prompts)
    contact_sheet([[drawn[key] for key in row] for row in keys], rows, columns, file)
    return file


def contact_sheet(pictures: Sequence[Sequence[Any]], rows: Sequence[str], columns: Sequence[str], file: Path) -> None:
    """Write PIL pictures in rows and columns with their names to a PNG. Tiny ones are enlarged, large ones shrunk."""
    from PIL import Image, ImageDraw, ImageFont

    tiles = [[_tile(picture) for picture in row] for row in pictures]
    width = max(tile.width for row in tiles for tile in row) + GAP
    height = max(max(tile.height for row in tiles for tile in row), 2 * LINE) + GAP
    large, small = ImageFont.load_default(13), ImageFont.load_default(12)
    left, top = 180, 2 * GAP + LINE
    sheet = Image.new("RGB", (left + width * len(columns) + GAP, top + height * len(rows) + GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, name in enumerate(columns):
        pen.text((left + number * width, GAP), name, fill=_SOFT, font=small)
    for number, (name, row) in enumerate(zip(rows, tiles, strict=True)):
        pen.multiline_text((GAP, top + number * height), _wrapped(name, 24), fill=_INK, font=large)
        for column, tile in enumerate(row):
            sheet.paste(tile, (left + column * width, top + number * height))
    with replacing(file) as out:
        sheet.save(out, format="PNG")


def _tile(picture: Any) -> Any:
    from PIL import Image

    longest = max(picture.size)
    if longest >= SMALLEST and longest <= LARGEST:
        return picture
    scale = -(-SMALLEST // longest) if longest < SMALLEST else LARGEST / longest
    way = Image.Resampling.NEAREST if longest < SMALLEST else Image.Resampling.LANCZOS
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), way)


def _wrapped(text: str, width: int) -> str:
    import textwrap

    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, width)] or [""]
    return "\n".join(lines[:5] + (["..."] if len(lines) > 5 else []))
