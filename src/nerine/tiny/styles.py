"""The looks of a digit: how a grey stroke becomes a coloured picture, and how it is read back.

A stroke is grey, `[n, 1, h, w]` in [0, 1], 1 = ink. A picture is RGB, `[n, 3, h, w]` in [-1, 1]. Drawing is
used once, to make the pictures that ship with the package; reading is what lets one judge, trained on plain
strokes alone, read every style. Knows nothing of models, files or prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from nerine.errors import OptionError

NAVY, CYAN, MAGENTA = (0.05, 0.05, 0.25), (0.0, 0.9, 1.0), (1.0, 0.1, 0.8)
CREAM, BLUE = (0.98, 0.95, 0.85), (0.10, 0.15, 0.60)
CORE = 1.5  # exponent that narrows the magenta core inside the glow


@dataclass(frozen=True)
class Style:
    """One look: `draw` maps strokes in [0, 1] to RGB in [0, 1], `read` maps the picture back to strokes."""

    draw: Callable[[Tensor], Tensor]
    read: Callable[[Tensor], Tensor]


def draw(strokes: Tensor, style: str) -> Tensor:
    """The strokes as a picture in [-1, 1].

    *Raises* OptionError for an unknown style.
    """
    return find(style).draw(strokes).clamp(0, 1) * 2 - 1


def read(pictures: Tensor, style: str) -> Tensor:
    """The strokes in [0, 1] that a picture in [-1, 1] shows when it is taken to be in that style.

    *Raises* OptionError for an unknown style.
    """
    return find(style).read((pictures.float() + 1) / 2).clamp(0, 1)


def find(style: str) -> Style:
    """The style of that name. *Raises* OptionError for an unknown one."""
    if style not in STYLES:
        raise OptionError(f"style: expected one of {', '.join(STYLES)}, found {style!r}")
    return STYLES[style]


def _mix(start: Tensor, end: Tensor, amount: Tensor) -> Tensor:
    return start + (end - start) * amount


def _colour(rgb: tuple[float, float, float], like: Tensor) -> Tensor:
    return like.new_tensor(rgb)[:, None, None]


def _draw_plain(strokes: Tensor) -> Tensor:
    return strokes.expand(-1, 3, -1, -1)


def _read_plain(rgb: Tensor) -> Tensor:
    return rgb.mean(1, keepdim=True)


def _draw_neon(strokes: Tensor) -> Tensor:
    glow = F.avg_pool2d(F.pad(strokes, (2,) * 4, mode="replicate"), 5, 1)
    halo = _mix(_colour(NAVY, strokes), _colour(CYAN, strokes), (1.6 * glow).clamp(0, 1))
    return _mix(halo, _colour(MAGENTA, strokes), strokes**CORE)


def _read_neon(rgb: Tensor) -> Tensor:
    red = (rgb[:, :1] - NAVY[0]) / (MAGENTA[0] - NAVY[0])  # only the core is red; the glow has less than the ground
    return red.clamp(0, 1) ** (1 / CORE)


def _draw_paper(strokes: Tensor) -> Tensor:
    return _mix(_colour(CREAM, strokes), _colour(BLUE, strokes), strokes)


def _read_paper(rgb: Tensor) -> Tensor:
    return (CREAM[0] - rgb[:, :1]) / (CREAM[0] - BLUE[0])


STYLES: dict[str, Style] = {
    "plain": Style(_draw_plain, _read_plain),
    "neon": Style(_draw_neon, _read_neon),
    "paper": Style(_draw_paper, _read_paper),
}
