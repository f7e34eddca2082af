"""What a shelf holds, as plain data: `str()` is a table, `to_dict()` is ready for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nerine.tables import table

__all__ = ["ShelfReport", "ShelfRow"]


@dataclass(frozen=True)
class ShelfRow:
    """One adapter: how many layers it has, of which algorithms, its size in memory, and whether it is on the device."""

    name: str
    layers: int
    algorithms: str
    values: int
    bytes: int
    strength: float
    resident: bool
    source: str


@dataclass(frozen=True)
class ShelfReport:
    """One row for each adapter, the layers of the model that have any, and how many may be on the device."""

    rows: tuple[ShelfRow, ...]
    layers: int
    limit: int

    @property
    def bytes(self) -> int:
        """Memory of all adapters, without what is on devices."""
        return sum(row.bytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bytes": self.bytes}

    def __str__(self) -> str:
        head = ("name", "layers", "algorithm", "values", "strength", "device", "from")
        rows = [
            (r.name, r.layers, r.algorithms, f"{r.values:,}", f"{r.strength:g}", "yes" if r.resident else "", r.source)
            for r in self.rows
        ]
        here = sum(row.resident for row in self.rows)
        count = f"{len(rows)} adapter{'s' if len(rows) != 1 else ''} ({self.bytes:,} bytes) for {self.layers} layers"
        lines = [table(head, rows)] if rows else []
        return "\n".join([*lines, f"{count}, {here} of at most {self.limit} on the device"])
