"""Paths without their dots, and back: by the words that the modules of diffusers, transformers and the original
implementations are called, which words.txt lists."""

from __future__ import annotations

import functools
from importlib.resources import files

__all__ = ["flatten", "unflatten"]


def flatten(path: str) -> str:
    """A dotted layer path as one word."""
    return path.replace(".", "_")


@functools.cache
def _words() -> tuple[frozenset[str], int]:
    """The words, and the most parts that one has."""
    text = files("nerine.files.names").joinpath("words.txt").read_text(encoding="utf-8")
    words = frozenset(text.split())
    return words, max(word.count("_") for word in words) + 1


def unflatten(name: str) -> str | None:
    """The dotted path of a flattened one: the way to read it in the fewest words, of several the one with the longest
    last word; None where it has words that are not known, or two readings are as good.

    Source: the vocabulary is that of 100 model classes of diffusers 0.42 and transformers 5.24.
    """
    words, longest = _words()
    tokens = name.split("_")
    best: list[list[tuple[str, ...]]] = [[()], *([] for _ in tokens)]
    for end in range(1, len(tokens) + 1):
        found: list[tuple[str, ...]] = []
        for start in range(max(0, end - longest), end):
            word = "_".join(tokens[start:end])
            if word in words or (end - start == 1 and word.isdigit()):
                found += [(*before, word) for before in best[start]]
        fewest = min(map(len, found), default=0)
        best[end] = [reading for reading in found if len(reading) == fewest][:8]
    readings = sorted(best[-1], key=lambda reading: -len(reading[-1]))
    if not readings or (len(readings) > 1 and len(readings[0][-1]) == len(readings[1][-1])):
        return None
    return ".".join(readings[0])
