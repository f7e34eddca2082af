"""Single pictures: how large they are, and what a frame cuts out of them, as a tensor."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nerine.errors import FormatError, MissingExtra
from nerine.train.batch import Frame

__all__ = ["measure", "read_picture"]

_TURNED = (5, 6, 7, 8)  # EXIF orientations that lie on their side
_ORIENTATION = 0x0112
_TOLD = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")  # chunks of a PNG that may say how it is turned
_WHITE = (255, 255, 255)


def measure(file: Path) -> tuple[int, int]:
    """(width, height) in pixels as the picture is meant to be seen; its content is not decoded.

    Not for several threads at once: it silences Pillow's warnings, which are the whole process's.

    Raises:
        FormatError: it cannot be opened, or is so large that it may be an attack.
    """
    with _without_warnings(), _opened(file) as image:
        width, height = image.size
        return (height, width) if _is_on_its_side(image, file) else (width, height)


def read_picture(file: Path, frame: Frame, flipped: bool = False) -> Tensor:
    """The frame of a picture, `[3, height, width]` in [-1, 1], fp32; what is transparent is white.

    Raises:
        FormatError: it cannot be read any more.
    """
    from PIL import Image, ImageOps

    with _opened(file) as image:
        upright = _rgb(ImageOps.exif_transpose(image))
        if upright.size != frame.scaled:
            shrinks = frame.scaled[0] < upright.width
            way = Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC
            upright = upright.resize(frame.scaled, way)
        left, top = frame.corner
        upright = upright.crop((left, top, left + frame.size[0], top + frame.size[1]))
        if flipped:
            upright = ImageOps.mirror(upright)
        levels = torch.frombuffer(bytearray(upright.tobytes()), dtype=torch.uint8)
    return levels.reshape(frame.size[1], frame.size[0], 3).permute(2, 0, 1).float() / 127.5 - 1


def _rgb(image: Any) -> Any:
    """In RGB, on white, whatever it was."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):  # 16 bits of grey
        import numpy

        levels = numpy.asarray(image, dtype=numpy.float64)
        top = 65535 if image.mode.startswith("I") else max(1.0, float(levels.max()))
        return Image.fromarray((levels / top * 255).clip(0, 255).astype(numpy.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        cut = image.convert("RGBA")
        ground = Image.new("RGBA", cut.size, (*_WHITE, 255))
        return Image.alpha_composite(ground, cut).convert("RGB")
    return image.convert("RGB")


def _is_on_its_side(image: Any, file: Path) -> bool:
    """Whether its metadata has it turned by a quarter; pixels are only decoded where they lie in front of metadata."""
    from PIL import Image

    if image.format == "PNG" and not _has_metadata_behind(file):
        return Image.Image.getexif(image).get(_ORIENTATION) in _TURNED  # the method of PNG reads all first
    return image.getexif().get(_ORIENTATION) in _TURNED


def _has_metadata_behind(file: Path) -> bool:
    """Whether a PNG may tell something of itself behind its pixels: it does, or it has no proper end."""
    found, pixels = False, False
    with open(file, "rb") as opened:
        end = opened.seek(0, 2)
        place = 8  # behind the signature
        while place + 12 <= end:
            opened.seek(place)
            head = opened.read(8)
            kind, place = head[4:], place + 12 + int.from_bytes(head[:4], "big")
            pixels = pixels or kind == b"IDAT"
            found = found or (pixels and kind in _TOLD)
            if kind == b"IEND" and place <= end:
                return found
    return True


@contextmanager
def _without_warnings() -> Iterator[None]:
    """No warnings of pictures that are damaged or too large: those are skipped, and the report says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A picture for the length of a `with` block; what goes wrong with it in there is a FormatError."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtra(f'pictures need Pillow ({error}): pip install "nerine[train]"') from error
    try:
        with Image.open(file) as image:
            width, height = image.size
            if not width or not height:
                raise FormatError(f"{file}: the picture has no pixels")
            if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
                raise FormatError(
                    f"{file}: {width} x {height} pixels, expected at most {Image.MAX_IMAGE_PIXELS}; make it smaller"
                )
            yield image
    except FormatError:
        raise
    except UnidentifiedImageError as error:
        raise FormatError(f"{file}: not a picture of a known kind, or damaged at its beginning") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise FormatError(f"{file}: {error}") from error
    except Exception as error:  # Pillow raises whatever it stumbles upon in a damaged file
        raise FormatError(f"{file}: the picture cannot be read: {error}") from error
