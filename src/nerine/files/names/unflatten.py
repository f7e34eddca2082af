"""Flattened names put back together without a model: `down_blocks_0_attentions_0_proj_in` is taken apart into words
that models are known to use. A name says too little for that ("proj_in" might be a `proj` with an `in`), so the reading
with the fewest pieces counts, and where two have equally few there is no answer. With a model at hand, look the name up
(`families.aliases`) instead.
"""

from __future__ import annotations

from functools import cache

from nerine.files.names.words import WORDS

__all__ = ["unflatten"]


MANY = 8  # readings of one beginning; more are as little an answer as two, and a hostile name may have millions


class Node:
    """A beginning of some entries of the vocabulary, as a tree of the parts between underscores and dots."""

    __slots__ = ("below", "entry")

    def __init__(self) -> None:
        self.below: dict[str, Node] = {}
        self.entry: str | None = None


@cache
def _vocabulary() -> Node:
    root = Node()
    for entry in WORDS:
        node = root
        for part in entry.replace(".", "_").split("_"):
            node = node.below.setdefault(part, Node())
        node.entry = entry
    root.below.setdefault("*", Node()).entry = "*"
    return root


def _filled(entry: str, parts: list[str]) -> str:
    """The entry as it stands in this name: stars are numbers."""
    if "*" not in entry:
        return entry
    flat = entry.replace(".", "_").split("_")
    numbers = iter(part for part, known in zip(parts, flat, strict=True) if known == "*")
    return ".".join(next(numbers) if word == "*" else word for word in entry.split("."))


def unflatten(name: str) -> str | None:
    """The dotted path that a flattened one was made of, or None.

    None where a word is unknown, and where two readings are equally likely.
    """
    parts = name.split("_")
    root = _vocabulary()
    best: list[tuple[int, frozenset[str]]] = [(0, frozenset([""]))]  # the fewest pieces up to here, and their readings
    best += [(len(parts) + 1, frozenset())] * len(parts)
    for start in range(len(parts)):
        pieces, readings = best[start]
        if not readings:
            continue
        nodes = [root]
        for end in range(start, len(parts)):
            keys = (parts[end], "*") if parts[end].isdigit() else (parts[end],)
            nodes = [node.below[key] for node in nodes for key in keys if key in node.below]
            if not nodes:
                break
            for entry in (node.entry for node in nodes if node.entry is not None):
                piece = _filled(entry, parts[start : end + 1])
                found = frozenset(f"{reading}.{piece}" if reading else piece for reading in readings)
                fewest, others = best[end + 1]
                if pieces + 1 < fewest:
                    best[end + 1] = (pieces + 1, found)
                elif pieces + 1 == fewest:
                    best[end + 1] = (fewest, others if len(others) > MANY else others | found)
    readings = best[-1][1]
    return next(iter(readings)) if len(readings) == 1 else None
