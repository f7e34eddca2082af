"""What goes from the pictures to the loss: a draw is one picture as a step wants it, a batch what a model gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

__all__ = ["Batch", "Draw", "Frame", "Latents", "Picture", "Text"]

Text = Mapping[str, Tensor]  # what a model is told of the prompts: each tensor [batch, ...]


class Latents(NamedTuple):
    """What the VAE says of pictures, `[batch, channels, height, width]`, scaled as the denoiser wants it. Where it says
    a distribution, `std` is its width; a model that works on pixels has none."""

    mean: Tensor
    std: Tensor | None = None


@dataclass(frozen=True)
class Picture:
    """A picture of the data, not yet read. `size` is (width, height) in pixels, turned as it is meant to be seen;
    `caption` begins with `prefix`, which stays in front whatever else is shuffled."""

    file: Path
    caption: str
    size: tuple[int, int]
    repeats: int = 1
    weight: float = 1.0  # of its loss
    shuffle_tags: bool = False
    keep_tokens: int = 0
    caption_dropout: float = 0.0
    flip: bool = False
    prefix: str = ""
    regularization: bool = False


class Frame(NamedTuple):
    """What is cut out of a picture: it is scaled to `scaled`, and the window of `size` at `corner` kept; all are
    (width, height) or (left, top) in pixels."""

    scaled: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class Draw:
    """One picture as one step wants it. `where` is (micro-batch of the run, place in it), the same for any number of
    processes: whatever is random about it is drawn from there."""

    picture: Picture
    caption: str
    frame: Frame
    flipped: bool
    where: tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """What the model is given. `text` is None where the captions are to be encoded in the step itself; `sizes` are
    [batch, 6]: original height and width, top and left of the crop, height and width of what is left; `weights`
    [batch] multiply the losses; `where` is that of the draws."""

    latents: Latents
    text: Text | None
    captions: tuple[str, ...]
    sizes: Tensor
    weights: Tensor
    where: tuple[tuple[int, int], ...]
