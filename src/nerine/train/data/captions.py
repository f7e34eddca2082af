"""What a picture's caption is in one step: some are left out, and the parts of others come in another order."""

from __future__ import annotations

from nerine.train.batch import Picture
from nerine.train.randomness import Dice

__all__ = ["caption_of", "prefixed"]

_MARK = ","


def prefixed(prefix: str, caption: str) -> str:
    """The caption with the prefix in front, and a space between them where the prefix does not end in one."""
    between = " " if prefix and caption and not prefix[-1].isspace() else ""
    return f"{prefix}{between}{caption}"


def caption_of(picture: Picture, dice: Dice, where: tuple[int, int]) -> str:
    """The caption as the step at `where` has it: now and then none, else with its parts between commas shuffled.

    The prefix stays in front always; of the parts behind it, the first `keep_tokens` stay where they are.
    """
    if picture.caption_dropout and dice.chance("caption", *where) < picture.caption_dropout:
        return ""
    if not picture.shuffle_tags:
        return picture.caption
    words = picture.caption.removeprefix(picture.prefix)
    parts = [part.strip() for part in words.split(_MARK)]
    kept, rest = parts[: picture.keep_tokens], parts[picture.keep_tokens :]
    order = dice.order(len(rest), "tags", *where)
    return prefixed(picture.prefix, f"{_MARK} ".join([*kept, *(rest[i] for i in order)]))
