"""The one form that adapters have in memory between a file and a model: records by layer path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nerine.algorithms import Algorithm, Params
from nerine.files.meta import Meta
from nerine.site import Site
from nerine.tables import table

__all__ = ["Checkpoint", "LoadReport", "LoadRow", "Record", "SaveReport"]


@dataclass(frozen=True)
class Record:
    """The adapter of one layer: algorithm, shape of the layer, and tensors in canonical names and shapes."""

    algorithm: Algorithm
    site: Site
    params: Params


@dataclass(frozen=True)
class LoadRow:
    """What was read for one layer. `rank` is None where the tensors have none."""

    layer: str
    algorithm: str
    rank: int | None
    scale: float
    note: str = ""


@dataclass(frozen=True)
class LoadReport:
    """What became of a file: layers matched, keys that were not used (with the reason), layers that are missing."""

    file: str
    rows: tuple[LoadRow, ...] = ()
    unmatched: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()  # matched, but not executed by the model while others were

    def lacking(self, layers: tuple[str, ...]) -> LoadReport:
        """This report with `layers` among the missing ones."""
        return replace(self, missing=tuple(dict.fromkeys([*self.missing, *layers])))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rows = [(r.layer, r.algorithm, "" if r.rank is None else r.rank, f"{r.scale:g}", r.note) for r in self.rows]
        lines = [table(("layer", "algorithm", "rank", "scale", "note"), rows)] if rows else []
        lines.append(
            f"{self.file}: {len(self.rows)} layers matched, {len(self.unmatched)} keys not used, "
            f"{len(self.missing)} layers missing"
        )
        lines += [f"not used: {key}: {why}" for key, why in self.unmatched.items()]
        lines += [f"missing: {path}" for path in self.missing]
        lines += [f"never executed: {path}: its adapter has no effect" for path in self.idle]
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class SaveReport:
    """What was written."""

    file: str
    dialect: str
    layers: int
    tensors: int
    bytes: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        head = f"{self.file}: {self.layers} layers, {self.tensors} tensors, {self.bytes:,} bytes ({self.dialect})"
        return "\n".join([head, *self.notes])


@dataclass(frozen=True)
class Checkpoint:
    """Records by layer path, what the file said of itself, and the report of reading it."""

    records: Mapping[str, Record]
    meta: Meta
    report: LoadReport
