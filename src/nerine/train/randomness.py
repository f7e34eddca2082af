"""Chance without a state: every draw of a run is a function of the seed, of what it is for, and of where it is.

So there is nothing to save: a run that goes on from step 500 draws what it would have drawn, two processes draw what
one would have, and a picture gets the same noise in whichever process it is.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["Dice"]


class Dice:
    """The draws of the run with this seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def number(self, what: str, *where: int | str) -> int:
        """63 bits that only these words and numbers give."""
        text = "/".join(map(str, (self.seed, what, *where)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

    def generator(self, what: str, *where: int | str) -> torch.Generator:
        """A fresh generator on the CPU for one purpose at one place."""
        return torch.Generator().manual_seed(self.number(what, *where))

    def chance(self, what: str, *where: int | str) -> float:
        """A number in [0, 1)."""
        return (self.number(what, *where) >> 10) / 2**53

    def order(self, count: int, what: str, *where: int | str) -> list[int]:
        """0 ... count - 1, shuffled."""
        found: list[int] = torch.randperm(count, generator=self.generator(what, *where)).tolist()
        return found

    def normal(self, shape: tuple[int, ...], what: str, *where: int | str) -> Tensor:
        """Standard normal numbers in fp32, on the CPU."""
        return torch.randn(shape, generator=self.generator(what, *where))
