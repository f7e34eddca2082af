"""What a picture's caption is in one step: some are left out, and the parts of others come in another order."""

from __future__ import annotations

from nerine.train.batch import Picture
from nerine.train.randomness import Dice

__all__ = ["caption_of"]

_MARK = ","


def caption_of(picture: Picture, dice: Dice, where: tuple[int, int]) -> str:
    """The caption as the step at `where` has it. Of shuffled tags the first `keep_tokens` stay in front."""
    if picture.caption_dropout and dice.chance("caption", *where) < picture.caption_dropout:
        return ""
    if not picture.shuffle_tags:
        return picture.caption
    parts = [part.strip() for part in picture.caption.split(_MARK)]
    kept, rest = parts[: picture.keep_tokens], parts[picture.keep_tokens :]
    order = dice.order(len(rest), "tags", *where)
    return f"{_MARK} ".join([*kept, *(rest[i] for i in order)])
