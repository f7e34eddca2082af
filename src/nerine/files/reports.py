"""What reading and writing a file came to, as plain data: `str()` is a table, `to_dict()` is ready for JSON."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nerine.errors import shown
from nerine.tables import table

__all__ = ["LoadReport", "LoadRow", "ReaderRow", "SaveReport"]


@dataclass(frozen=True)
class LoadRow:
    """What was read for one layer. `rank` is None where the tensors have none; `axis` is that of a DoRA norm."""

    layer: str
    algorithm: str
    rank: int | None
    scale: float
    note: str = ""
    axis: str = ""


@dataclass(frozen=True)
class LoadReport:
    """What became of a file: layers matched, every key with what it was used for or why it was not, layers missing."""

    file: str
    rows: tuple[LoadRow, ...] = ()
    unmatched: Mapping[str, str] = field(default_factory=dict)  # key: why it was not used
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()  # matched, but not executed by the model while others were
    used: Mapping[str, str] = field(default_factory=dict)  # key: the layer it is used for
    dialect: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)  # how much of the file each dialect explains

    def lacking(self, layers: tuple[str, ...]) -> LoadReport:
        """This report with `layers` among the missing ones."""
        return replace(self, missing=tuple(dict.fromkeys([*self.missing, *layers])))

    def only(self, layers: Collection[str], why: str) -> LoadReport:
        """This report where just `layers` were read: the keys of the others were not used, and `why`."""
        others = {
            key: why
            for key, path in self.used.items()
            if not (path in layers or path.split("[")[0] in layers or path.startswith("embedding "))
        }
        return replace(
            self,
            rows=tuple(row for row in self.rows if row.layer in layers),
            unmatched={**self.unmatched, **others},
            missing=tuple(path for path in self.missing if path in layers),
            used={key: path for key, path in self.used.items() if key not in others},
        )

    @property
    def counts(self) -> dict[str, int]:
        """How many layers were read, keys used and not used, and layers missing."""
        return {
            "layers": len(self.rows),
            "keys used": len(self.used),
            "keys not used": len(self.unmatched),
            "layers missing": len(self.missing),
        }

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "counts": self.counts}

    def __str__(self) -> str:
        head = ("layer", "algorithm", "rank", "scale", "axis", "note")
        rows = [
            (r.layer, r.algorithm, "" if r.rank is None else r.rank, f"{r.scale:g}", r.axis, r.note) for r in self.rows
        ]
        lines = [table(head, rows)] if rows else []
        lines.append(
            f"{self.file}{f' ({self.dialect})' if self.dialect else ''}: {len(self.rows)} layers matched, "
            f"{len(self.unmatched)} keys not used, {len(self.missing)} layers missing"
        )
        lines += [f"not used: {shown(key)}: {why}" for key, why in self.unmatched.items()]
        lines += [f"missing: {shown(path)}" for path in self.missing]
        lines += [f"never executed: {path}: its adapter has no effect" for path in self.idle]
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class ReaderRow:
    """How one program will read a file: how many layers exactly, approximately and not at all.

    `worst` is the largest relative deviation |W'read - W'| / |W' - W| of a layer, where it was worked out. `better` is
    the dialect in which that program reads all layers exactly, if there is one and it is not this.
    """

    reader: str
    exactly: int
    approximately: int
    not_at_all: int
    why: str = ""
    worst: float | None = None
    better: str = ""


@dataclass(frozen=True)
class SaveReport:
    """What was written, and who will read it how."""

    file: str
    dialect: str
    layers: int
    tensors: int
    bytes: int
    notes: tuple[str, ...] = ()
    readers: tuple[ReaderRow, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.file}: {self.layers} layers, {self.tensors} tensors, {self.bytes:,} bytes ({self.dialect})"]
        if self.readers:
            head = ("read by", "exactly", "approximately", "not at all", "off by", "why", "better as")
            rows = [
                (r.reader, r.exactly, r.approximately, r.not_at_all, _percent(r.worst), r.why, r.better)
                for r in self.readers
            ]
            lines.append(table(head, rows))
        return "\n".join([*lines, *self.notes])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
