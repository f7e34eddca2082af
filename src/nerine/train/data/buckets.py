"""Buckets: the sizes to which pictures are brought, so that each loses little and a batch is of one size."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

from nerine.errors import OptionError
from nerine.train.batch import Frame

__all__ = ["Buckets"]

Size = tuple[int, int]


@dataclass(frozen=True)
class Buckets:
    """Sizes (width, height) of about `resolution`² pixels whose sides are multiples of `step`, none of them longer than
    `max_aspect` times the other. Without `many` there is the square alone; without `upscale` small pictures get
    smaller sizes of their own.

    Raises:
        OptionError: not even a square fits.
    """

    resolution: int
    step: int
    many: bool = True
    max_aspect: float = 2.0
    upscale: bool = True

    def __post_init__(self) -> None:
        if self.resolution < self.step:
            raise OptionError(
                f"resolution {self.resolution} is below {self.step}, of which the sides of pictures are multiples here"
            )

    def sizes(self) -> list[Size]:
        """All of them, from tall to wide."""
        side = self.resolution // self.step * self.step
        if not self.many:
            return [(side, side)]
        area, found = self.resolution**2, {(side, side)}
        for width in range(self.step, int(self.resolution * self.max_aspect) + 1, self.step):
            height = int(area / width) // self.step * self.step
            if height and max(width / height, height / width) <= self.max_aspect:
                found |= {(width, height), (height, width)}
        return sorted(found, key=lambda size: (size[0] / size[1], size))

    def frame(self, size: Size, corner: tuple[float, float] = (0.5, 0.5)) -> Frame:
        """How a picture of that size is scaled, to cover its bucket, and cut. `corner` says where the window lies, as
        shares of what is cut away: in the middle, or as chance has it."""
        bucket = self._fitting(size)
        scale = max(bucket[0] / size[0], bucket[1] / size[1])
        scaled = (max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale)))
        left, top = (round((scaled[i] - bucket[i]) * corner[i]) for i in (0, 1))
        return Frame(scaled, (left, top), bucket)

    def _fitting(self, size: Size) -> Size:
        """The bucket whose aspect ratio is the nearest, and of those the one that keeps the most pixels."""
        best = self._nearest(math.log(size[0] / size[1]))
        if self.upscale or (size[0] >= best[0] and size[1] >= best[1]):
            return best
        shrunk = min(size[0] / best[0], size[1] / best[1])
        width, height = (max(self.step, int(side * shrunk + 1e-9) // self.step * self.step) for side in best)
        return width, height

    def _nearest(self, aspect: float) -> Size:
        aspects, largest = self._by_aspect
        right = bisect_left(aspects, aspect)
        near = range(max(0, right - 1), min(len(aspects), right + 1))
        # a difference that rounding alone makes is none
        return largest[min(near, key=lambda i: (round(abs(aspects[i] - aspect), 9), -largest[i][0] * largest[i][1]))]

    @cached_property
    def _by_aspect(self) -> tuple[list[float], list[Size]]:
        """The logarithms of the aspect ratios that there are, growing, and the largest size of each."""
        largest: dict[float, Size] = {}
        for width, height in self.sizes():
            aspect = math.log(width / height)
            largest[aspect] = max(largest.get(aspect, (0, 0)), (width, height))
        return list(largest), list(largest.values())
