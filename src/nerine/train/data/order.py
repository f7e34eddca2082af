"""The order of the pictures: which of them a step has, as a function of its number.

An epoch has each picture as often as it is repeated, in batches of one size each. Where a size has too few for its last
batch, more pictures of that size fill it up, so that every batch has as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from nerine.errors import OptionError
from nerine.train.batch import Draw, Frame, Picture
from nerine.train.data.buckets import Buckets
from nerine.train.data.captions import caption_of
from nerine.train.randomness import Dice

__all__ = ["Order"]


@dataclass
class Order:
    """`order.batch(n)` is the n-th micro-batch of a run: `size` draws, over all processes. `is_random` cuts pictures at
    random places instead of in the middle.

    Raises:
        OptionError: there is nothing to put in order.
    """

    pictures: Sequence[Picture]
    buckets: Buckets
    size: int
    dice: Dice
    is_random: bool = False
    _frames: list[Frame] = field(init=False, repr=False)
    _by_size: dict[tuple[int, int], list[int]] = field(init=False, repr=False)
    _epoch: tuple[int, list[list[int]]] = field(init=False, repr=False, default=(-1, []))

    def __post_init__(self) -> None:
        known = {size: self.buckets.frame(size) for size in {p.size for p in self.pictures}}
        self._frames = [known[p.size] for p in self.pictures]
        self._by_size = {}
        for index, (picture, frame) in enumerate(zip(self.pictures, self._frames, strict=True)):
            self._by_size.setdefault(frame.size, []).extend([index] * picture.repeats)
        if self.size < 1 or not any(self._by_size.values()):
            seen = sum(map(len, self._by_size.values()))
            raise OptionError(
                f"data: expected at least one picture in an epoch and in a batch, got {len(self.pictures)} pictures, "
                f"{seen} with their repeats, in batches of {self.size}"
            )

    @cached_property
    def per_epoch(self) -> int:
        """Micro-batches of an epoch."""
        return sum(-(-len(members) // self.size) for members in self._by_size.values())

    @property
    def filled(self) -> int:
        """Places of an epoch that hold a picture once more."""
        return self.per_epoch * self.size - sum(map(len, self._by_size.values()))

    def counts(self) -> dict[str, int]:
        """{"512x768": how many pictures, with their repeats}."""
        return {f"{w}x{h}": len(members) for (w, h), members in sorted(self._by_size.items())}

    def frame(self, picture: int) -> Frame:
        """The middle frame of a picture, by its number."""
        return self._frames[picture]

    def batch(self, number: int) -> list[Draw]:
        """The draws of a micro-batch."""
        epoch, within = divmod(number, self.per_epoch)
        return [self._draw(index, (number, place)) for place, index in enumerate(self._batches(epoch)[within])]

    def _draw(self, index: int, where: tuple[int, int]) -> Draw:
        picture, frame = self.pictures[index], self._frames[index]
        if self.is_random:
            corner = (self.dice.chance("crop", *where, 0), self.dice.chance("crop", *where, 1))
            frame = self.buckets.frame(picture.size, corner)
        flipped = picture.flip and self.dice.chance("flip", *where) < 0.5
        return Draw(picture, caption_of(picture, self.dice, where), frame, flipped, where)

    def _batches(self, epoch: int) -> list[list[int]]:
        """Numbers of pictures in the batches of an epoch; the last epoch asked for is kept."""
        if self._epoch[0] != epoch:
            found = []
            for size, members in sorted(self._by_size.items()):
                order = [members[i] for i in self.dice.order(len(members), "pictures", epoch, *size)]
                missing = -len(order) % self.size
                again = self.dice.order(len(members), "filling", epoch, *size)
                order += [members[again[i % len(members)]] for i in range(missing)]
                found += [order[i : i + self.size] for i in range(0, len(order), self.size)]
            shuffled = self.dice.order(len(found), "batches", epoch)
            self._epoch = (epoch, [found[i] for i in shuffled])
        return self._epoch[1]
