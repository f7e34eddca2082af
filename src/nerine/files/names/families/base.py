"""How the names of a model family are written down, and how they are looked up.

A family is a table with one column a naming and one row a layer. An entry is a dotted path in which

    *          stands for a number; the numbers of a row are the same, in the same order, in all of its columns
    {a,b,c}    are several layers, whose output rows, one after the other, are the one layer of another column
    a:2        is such a fused layer whose first 2 pieces have as many rows as `a` has inputs; the other pieces share
               the rest equally (without a number, all pieces are equal)
    a.**       stands for everything below `a`
    a~         has its two halves in the other order than the columns without the mark, where it has twice as many
               rows as inputs (scale and shift of an adaptive norm); `a~~` has them so in any case
    -          says that there is no such layer

Sizes and numbers of blocks come from the model, never from the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cached_property

__all__ = ["Alias", "Family", "Rows", "Shape", "Shapes", "Table", "renamed", "starred", "table"]

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Rows = tuple[int, int]
Table = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Alias:
    """Another program's name of a layer, or of some output rows of it.

    `name[rows]` there is `own[own_rows]` here; no rows are all rows. The own layer is fused where it has several
    aliases with `own_rows`; the other is where several layers have the same `name` with other `rows`.
    """

    name: str
    own: str
    own_rows: Rows | None = None
    rows: Rows | None = None


@dataclass(frozen=True)
class Entry:
    """One column of one row of a table, taken apart."""

    paths: tuple[str, ...]
    firsts: int = 0
    turned: int = 0
    is_prefix: bool = False

    @staticmethod
    def read(text: str) -> Entry:
        if text == "-":
            return Entry(())
        body = text.rstrip("~")
        body, _, firsts = body.partition(":")
        head, brace, tail = body.partition("{")
        paths = (body,) if not brace else tuple(head + piece for piece in tail.rstrip("}").split(","))
        is_prefix = body.endswith("**")
        if is_prefix:
            paths = (body[:-2].rstrip("."),)
        return Entry(paths, int(firsts or 0), text.count("~"), is_prefix)


Row = tuple[Entry, ...]
Found = tuple[Row, int, tuple[str, ...], str]  # the row, which piece of it, the numbers, what stands below a prefix


class Index:
    """The rows of a table by what one of its columns says: a tree of the words of the paths."""

    def __init__(self, rows: Iterable[Row], column: int) -> None:
        self._root = Node()
        for row in rows:
            entry = row[column]
            for piece, path in enumerate(entry.paths):
                node = self._root
                for word in path.split(".") if path else ():
                    node = node.below.setdefault(word, Node())
                if entry.is_prefix:
                    node.all_below = node.all_below or row
                else:
                    node.here = node.here or (row, piece)

    def find(self, path: str) -> Found | None:
        return _find(self._root, path.split("."), 0, ())


class Node:
    """One word of a path: what stands there, what stands for all that is below, and the words that may follow."""

    __slots__ = ("all_below", "below", "here")

    def __init__(self) -> None:
        self.below: dict[str, Node] = {}
        self.here: tuple[Row, int] | None = None
        self.all_below: Row | None = None


def _find(node: Node, words: list[str], at: int, numbers: tuple[str, ...]) -> Found | None:
    """What is written out goes before a star, and a star before everything below."""
    if at == len(words):
        return None if node.here is None else (*node.here, numbers, "")
    word = words[at]
    if (child := node.below.get(word)) is not None:
        found = _find(child, words, at + 1, numbers)
        if found is not None:
            return found
    if word.isdigit() and (child := node.below.get("*")) is not None:
        found = _find(child, words, at + 1, (*numbers, word))
        if found is not None:
            return found
    return None if node.all_below is None else (node.all_below, 0, numbers, ".".join(words[at:]))


def filled(path: str, numbers: tuple[str, ...]) -> str:
    """The path with its stars replaced by numbers."""
    if not numbers:
        return path
    left = iter(numbers)
    return ".".join(next(left) if word == "*" else word for word in path.split("."))


def _sizes(entry: Entry, shape: Shape, pieces: int) -> list[int] | None:
    """The rows of each piece of a fused layer, or None where they do not come out even."""
    rows = shape[0]
    firsts = [shape[1]] * entry.firsts if len(shape) > 1 else []
    others = pieces - len(firsts)
    size, odd = divmod(rows - sum(firsts), others)
    return None if odd or size < 0 else [*firsts, *[size] * others]


def _spans(sizes: Iterable[int]) -> Iterator[Rows]:
    start = 0
    for size in sizes:
        yield start, start + size
        start += size


@dataclass(frozen=True)
class Family:
    """The models that are built alike, and the names of their layers in each program.

    `marks` are paths that, all together, a model of this family has in a naming and others do not; a naming without
    marks is not told from the others by its paths.
    `table` has one column a naming; `grown` gives further rows that depend on how a model is built.
    """

    name: str
    namings: tuple[str, ...]
    marks: Mapping[str, tuple[str, ...]]
    table: Table
    grown: Callable[[Shapes, str], Table] | None = None

    @cached_property
    def _rows(self) -> tuple[Row, ...]:
        return tuple(tuple(Entry.read(text) for text in row) for row in self.table)

    @cached_property
    def _indices(self) -> tuple[Index, ...]:
        return tuple(Index(self._rows, column) for column in range(len(self.namings)))

    def is_likely(self, shapes: Shapes, patterns: Set[str], naming: str) -> bool:
        """Whether all marks are there; `patterns` are the paths with a star for every number."""
        marks = self.marks[naming]
        if not marks or any(starred(mark) not in patterns for mark in marks):
            return False
        counted = [mark for mark in marks if mark != starred(mark)]  # the number itself matters
        return all(any(starred(path, like=mark) == mark for path in shapes) for mark in counted)

    def known(self, shapes: Shapes, naming: str) -> list[tuple[str, Found]]:
        """The layers that the table has a row for."""
        column = self.namings.index(naming)
        index = self._indices[column]
        if self.grown is not None:
            grown = (tuple(Entry.read(text) for text in row) for row in self.grown(shapes, naming))
            index = Index([*grown, *self._rows], column)
        return [(path, known) for path in shapes if (known := index.find(path)) is not None]

    def aliases(self, shapes: Shapes, own: str) -> dict[str, tuple[Alias, ...]]:
        """The names of a model's layers in each of the namings but its `own`."""
        column = self.namings.index(own)
        known = self.known(shapes, own)
        return {
            naming: tuple(alias for path, found in known for alias in _aliases(shapes, path, found, column, other))
            for other, naming in enumerate(self.namings)
            if other != column
        }


def starred(path: str, like: str = "") -> str:
    """The path with a star for every number, or only where `like` has a star."""
    words = path.split(".")
    if not like:
        return ".".join("*" if word.isdigit() else word for word in words)
    others = like.split(".")
    if len(words) != len(others):
        return path
    return ".".join("*" if b == "*" and a.isdigit() else a for a, b in zip(words, others, strict=True))


def _aliases(shapes: Shapes, path: str, found: Found, column: int, other: int) -> Iterator[Alias]:
    row, piece, numbers, below = found
    here, there = row[column], row[other]
    if not there.paths:
        return
    if below:
        stem = filled(there.paths[0], numbers)
        yield Alias(f"{stem}.{below}" if stem else below, path)
    elif len(here.paths) == len(there.paths):
        name, shape = filled(there.paths[piece], numbers), shapes[path]
        turns = abs(here.turned - there.turned)
        if turns == 2 or (turns and len(shape) > 1 and shape[0] == 2 * shape[1]):
            half = shape[0] // 2
            yield Alias(name, path, (0, half), (half, 2 * half))
            yield Alias(name, path, (half, 2 * half), (0, half))
        else:
            yield Alias(name, path)
    elif len(there.paths) == 1:
        parts = [shapes.get(filled(part, numbers)) for part in here.paths]
        known = [part[0] for part in parts if part is not None]
        if len(known) == len(parts):
            yield Alias(filled(there.paths[0], numbers), path, rows=list(_spans(known))[piece])
    elif len(here.paths) == 1:
        sizes = _sizes(here, shapes[path], len(there.paths))
        for part, rows in zip(there.paths, _spans(sizes or ()), strict=False):
            yield Alias(filled(part, numbers), path, own_rows=rows)


def table(text: str, **words: Iterable[str]) -> Table:
    """A table written down as text, one row a line; a line with a <word> stands for one line a value of that word."""
    lines = [line for line in text.splitlines() if line.strip()]
    for word, values in words.items():
        each = [[line.replace(f"<{word}>", value) for value in values] for line in lines]
        lines = [line for versions in each for line in dict.fromkeys(versions)]
    return tuple(tuple(line.split()) for line in lines)


def renamed(shapes: Shapes, aliases: Iterable[Alias]) -> dict[str, Shape]:
    """The shapes that the layers have under their other names."""
    found: dict[str, Shape] = {}
    for alias in aliases:
        rows, *rest = shapes[alias.own]
        if alias.own_rows:
            rows = alias.own_rows[1] - alias.own_rows[0]
        end = alias.rows[1] if alias.rows else rows
        found[alias.name] = (max(end, found.get(alias.name, (0,))[0]), *rest)
    return found
