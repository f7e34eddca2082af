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
_WHITE = (255, 255, 255)


def measure(file: Path) -> tuple[int, int]:
    """(width, height) in pixels as the picture is meant to be seen; its content is not read.

    Raises:
        FormatError: it cannot be opened, or is so large that it may be an attack.
    """
    with _opened(file) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(_ORIENTATION) in _TURNED else (width, height)


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


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A picture for the length of a `with` block; what goes wrong with it in there is a FormatError."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtra(f'pictures need Pillow ({error}): pip install "nerine[train]"') from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                if not image.width or not image.height:
                    raise FormatError(f"{file}: the picture has no pixels")
                yield image
    except UnidentifiedImageError as error:
        raise FormatError(f"{file}: not a picture of a known kind, or damaged at its beginning") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise FormatError(f"{file}: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise FormatError(f"{file}: the picture cannot be read: {error}") from error
