"""Drawing with adapters: prompts to pictures, and sheets of pictures that are compared at a glance."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nerine.api import load
from nerine.errors import OptionError
from nerine.files.atomic import replacing
from nerine.model.adapter import check_strength
from nerine.model.network import Network
from nerine.model.strengths import Strength
from nerine.tables import listing
from nerine.tools.output import check_output
from nerine.train.families.base import Base, check_seed

__all__ = ["AdapterFile", "DrawingReport", "Worn", "contact_sheet", "generate", "put_on"]

Progress = Callable[[int, int, str], None]
Place = tuple[int, int, float]  # number of the prompt, seed, strength
SMALLEST, LARGEST = 96, 384  # pixels of a picture in a sheet
GAP, LINE, LEFT = 8, 17, 180  # pixels between pictures, of a line of text, and of the rows' names
_INK, _SOFT, _PAPER = (20, 20, 30), (110, 110, 125), (255, 255, 255)
_OTHERS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class AdapterFile:
    """A file, and the strength or strengths (by pattern) at which it counts."""

    file: str
    strength: Strength = 1.0

    def __str__(self) -> str:
        if not isinstance(self.strength, Mapping):
            return f"{self.file}:{self.strength:g}"
        return f"{self.file}:{','.join(f'{match}={number:g}' for match, number in self.strength.items())}"


@dataclass(frozen=True)
class Worn:
    """An adapter that a base wears: where it came from, and what it became."""

    file: AdapterFile
    network: Network


@dataclass(frozen=True, kw_only=True)
class DrawingReport:
    """What was drawn: the files, and for each picture its file, prompt, seed and strength."""

    files: tuple[str, ...]
    pictures: tuple[Mapping[str, Any], ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {"files": list(self.files), "pictures": [dict(p) for p in self.pictures], "seconds": self.seconds}

    def __str__(self) -> str:
        rows = [("pictures", f"{len(self.pictures)} in {self.seconds:.1f} s"), *(("file", file) for file in self.files)]
        return listing(rows)


def put_on(base: Base, adapters: Sequence[AdapterFile]) -> list[Worn]:
    """Load the adapters into the base's pipeline, ready to draw.

    Raises:
        FormatError, ShapeError, OptionError: as `nerine.load`.
    """
    found = []
    for number, one in enumerate(adapters):
        network = load(base.pipeline, one.file, strength=one.strength, name=f"adapter{number}")
        network.requires_grad_(False).eval()
        network.cache()
        found.append(Worn(one, network))
    return found


def generate(
    base: Base,
    prompts: Sequence[str],
    out: Path,
    *,
    adapters: Sequence[Worn] = (),
    strengths: Sequence[float] = (),
    seeds: Sequence[int] = (0,),
    force: bool = False,
    progress: Progress | None = None,
    **drawing: Any,
) -> DrawingReport:
    """Draw every prompt with every seed, and with `strengths` at each of these (which multiply those of the adapters).

    `out` is a folder for single pictures, or a .png: for the picture, where there is one, else for a sheet with a row
    for each prompt (and seed) and a column for each strength, or for each seed. `drawing` is handed to `Base.draw`:
    negative, steps, guidance, size.

    Raises:
        OptionError: there is nothing to draw, a file is there and `force` is not set, the base does not draw that
            size, there are strengths without adapters, or a strength or a seed is none.
    """
    if not prompts or not seeds:
        raise OptionError("prompts and seeds: expected at least one of each")
    if strengths and not adapters:
        raise OptionError("strengths: there is no adapter whose strength could be changed")
    for level in strengths:
        check_strength(level)
    for seed in seeds:
        check_seed(seed)
    if drawing.get("size") is not None:
        base.check_size(*drawing["size"])
    began = time.monotonic()
    levels = list(dict.fromkeys(strengths)) or [1.0]
    keys = [(n, seed, level) for level in levels for seed in dict.fromkeys(seeds) for n in range(len(prompts))]
    files = _files(keys, prompts, out, [one.file.file for one in adapters], force)
    drawn = _drawn(base, prompts, keys, adapters, drawing, progress)
    if len(keys) > 1 and out.suffix.lower() == ".png":
        _sheet(drawn, prompts, list(dict.fromkeys(seeds)), levels, out)
    else:
        common = {"base": _named(base), "adapters": ", ".join(str(one.file) for one in adapters) or "none"}
        for key in keys:
            n, seed, level = key
            size = "x".join(map(str, drawn[key].size))
            guidance = base.guidance if drawing.get("guidance") is None else drawing["guidance"]
            own = {"prompt": prompts[n], "seed": seed, "strength": f"{level:g}", "size": size, "guidance": guidance}
            _single(drawn[key], files[key], {**drawing, **own, **common})
    shown = tuple(
        {"file": str(files[n, seed, level]), "prompt": prompts[n], "seed": seed, "strength": level}
        for n, seed, level in keys
    )
    written = tuple(dict.fromkeys(map(str, files.values())))
    return DrawingReport(files=written, pictures=shown, seconds=time.monotonic() - began)


def _named(base: Base) -> str:
    return f"{type(base.pipeline).__name__} {getattr(base.pipeline, 'name_or_path', '') or ''}".strip()


def _files(
    keys: Sequence[Place], prompts: Sequence[str], out: Path, inputs: Sequence[str], force: bool
) -> dict[Place, Path]:
    """Where each picture goes to; found out before an hour is spent on drawing them.

    Raises:
        OptionError: it cannot go there.
    """
    if out.suffix.lower() in _OTHERS:
        raise OptionError(f"{out}: pictures are written as .png, for they keep what they were drawn from")
    if out.suffix.lower() == ".png":
        check_output(out, inputs, force)
        return dict.fromkeys(keys, out)
    words = [_words(prompt) for prompt in prompts]
    if len(set(words)) < len(words):
        words = [f"{number:02d}-{word}" for number, word in enumerate(words)]
    found = {(n, seed, level): out / f"{words[n]}-{seed}-{level:g}.png" for n, seed, level in keys}
    for file in found.values():
        if os.path.lexists(file):
            check_output(file, inputs, force)
    return found


def _words(prompt: str) -> str:
    """A prompt as a part of a file's name: letters, digits and hyphens."""
    return "".join(c if c.isalnum() else "-" for c in prompt.lower())[:40].strip("-") or "picture"


def _drawn(
    base: Base,
    prompts: Sequence[str],
    keys: Sequence[Place],
    adapters: Sequence[Worn],
    drawing: Mapping[str, Any],
    progress: Progress | None,
) -> dict[Place, Any]:
    """The pictures, one by one, so that each is the same whatever it is drawn with."""
    layers = [adapter for one in adapters for *_, adapter in one.network.adapters()]
    own = [adapter.strength for adapter in layers]
    drawn: dict[Place, Any] = {}
    try:
        for done, key in enumerate(keys, 1):
            number, seed, level = key
            for adapter, strength in zip(layers, own, strict=True):
                adapter.strength = strength * level
            drawn[key] = base.draw([prompts[number]], seeds=[seed], **drawing)[0]
            if progress is not None:
                progress(done, len(keys), prompts[number])
    finally:
        for adapter, strength in zip(layers, own, strict=True):
            adapter.strength = strength
    return drawn


def _single(picture: Any, file: Path, facts: Mapping[str, Any]) -> None:
    """One PNG, with what it was drawn from in its text."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, str(value))
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as out:
        picture.save(out, format="PNG", pnginfo=info)


def _sheet(
    drawn: Mapping[Place, Any], prompts: Sequence[str], seeds: Sequence[int], levels: Sequence[float], file: Path
) -> None:
    if len(levels) > 1:
        columns = [f"strength {level:g}" for level in levels]
        keys = [[(n, seed, level) for level in levels] for n in range(len(prompts)) for seed in seeds]
        several = len(seeds) > 1
        rows = [f"{prompt}\nseed {seed}" if several else prompt for prompt in prompts for seed in seeds]
    else:
        columns = [f"seed {seed}" for seed in seeds]
        keys = [[(n, seed, levels[0]) for seed in seeds] for n in range(len(prompts))]
        rows = list(prompts)
    contact_sheet([[drawn[key] for key in row] for row in keys], rows, columns, file)


def contact_sheet(pictures: Sequence[Sequence[Any]], rows: Sequence[str], columns: Sequence[str], file: Path) -> None:
    """Write PIL pictures in rows and columns with their names to a PNG. Tiny ones are enlarged, large ones shrunk."""
    from PIL import Image, ImageDraw, ImageFont

    tiles = [[_tile(picture) for picture in row] for row in pictures]
    names = [_wrapped(name, 24) for name in rows]
    width = max(tile.width for row in tiles for tile in row) + GAP
    height = max(*(tile.height for row in tiles for tile in row), *(LINE * len(name) for name in names)) + GAP
    large, small = ImageFont.load_default(13), ImageFont.load_default(12)
    top = 2 * GAP + LINE
    sheet = Image.new("RGB", (LEFT + width * len(columns) + GAP, top + height * len(rows) + GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, name in enumerate(columns):
        pen.text((LEFT + number * width, GAP), _cut(name, small, width - GAP), fill=_SOFT, font=small)
    for number, (lines, row) in enumerate(zip(names, tiles, strict=True)):
        pen.multiline_text((GAP, top + number * height), "\n".join(lines), fill=_INK, font=large)
        for column, tile in enumerate(row):
            sheet.paste(tile, (LEFT + column * width, top + number * height))
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


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` letters; what goes beyond five is left out."""
    import textwrap

    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, width)] or [""]
    return lines[:5] + (["..."] if len(lines) > 5 else [])


def _cut(text: str, font: Any, width: int) -> str:
    """The text, or as much of it as `width` pixels hold."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
