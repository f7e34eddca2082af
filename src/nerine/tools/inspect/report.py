"""What an inspection found, as plain data; the views of it (text, tables, JSON, a page) are made elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from nerine.tools.inspect.places import Spot, order_of
from nerine.tools.inspect.training import Training

__all__ = ["Block", "Finding", "InspectReport", "LayerRow", "middle"]


@dataclass(frozen=True)
class LayerRow:
    """One layer: what its adapter is, and the measures of the change W' - W that it makes.

    `norm` is that over all entries, `spectral` the largest singular value, `values` the leading ones. The effective
    rank is exp of the entropy of the shares σ²/Σσ², the stable rank norm²/spectral²; `limit` is the rank that the form
    can have. `relative` is norm/|W|. Measures are None where there is none; `lacking` says of what they are instead
    where the change itself needs the base.
    """

    layer: str
    component: str
    block: str
    kind: str
    algorithm: str
    shape: tuple[int, ...]
    parameters: int
    dtype: str
    rank: int | None = None
    alpha: float | None = None
    scale: float = 1.0
    axis: str = ""
    norm: float | None = None
    spectral: float | None = None
    effective_rank: float | None = None
    stable_rank: float | None = None
    limit: int | None = None
    values: tuple[float, ...] = ()
    relative: float | None = None
    base_norm: float | None = None
    bias_norm: float | None = None
    lacking: str = ""
    note: str = ""
    not_finite: tuple[str, ...] = ()

    @property
    def spot(self) -> Spot:
        return Spot(self.component, self.block, self.kind)

    @property
    def size(self) -> float | None:
        """What layers are compared by: the relative change where it is known, else the norm."""
        return self.norm if self.relative is None else self.relative


@dataclass(frozen=True)
class Finding:
    """Something suspicious about a layer: what it is called, and why it was noticed."""

    layer: str
    problem: str
    reason: str


@dataclass(frozen=True)
class Block:
    """The layers of one block together: how many, and the medians of their measures."""

    component: str
    name: str
    layers: int
    norm: float | None
    relative: float | None
    effective_rank: float | None


@dataclass(frozen=True)
class InspectReport:
    """What is in an adapter file. `str()` is a few tables of 80 columns, `to_dict()` is ready for JSON.

    `findings` are the suspicious layers; without any the file is `healthy`. `unmatched` are tensors that were not
    understood, and why. `dtypes` counts tensors, `embeddings` has shapes by trigger word and name.
    """

    file: str
    container: str
    bytes: int
    dialect: str
    scores: Mapping[str, float]
    rows: tuple[LayerRow, ...]
    findings: tuple[Finding, ...] = ()
    unmatched: Mapping[str, str] = field(default_factory=dict)
    embeddings: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    dtypes: Mapping[str, int] = field(default_factory=dict)
    training: Training = field(default_factory=Training)
    settings: tuple[str, ...] = ()
    written_by: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    base: str = ""
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        return not self.findings

    @property
    def algorithms(self) -> dict[str, int]:
        """{algorithm: layers}, the most frequent first."""
        return _counted(row.algorithm for row in self.rows)

    @property
    def components(self) -> dict[str, int]:
        """{part of the pipeline: layers}."""
        return _counted(row.component or "model" for row in self.rows)

    @property
    def ranks(self) -> dict[int, int]:
        """{rank: layers}, the most frequent first."""
        return _counted(row.rank for row in self.rows if row.rank is not None)

    @property
    def alphas(self) -> dict[float, int]:
        """{alpha: layers}, the most frequent first."""
        return _counted(row.alpha for row in self.rows if row.alpha is not None)

    @property
    def axes(self) -> dict[str, int]:
        """{axis of DoRA's norm: layers}."""
        return _counted(row.axis for row in self.rows if row.axis)

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks in the order in which a model runs through them; layers outside of any are blocks of their own."""
        found: dict[Spot, list[LayerRow]] = {}
        for row in self.rows:
            name = row.block or row.kind
            found.setdefault(Spot(row.component, row.block, "" if row.block else name), []).append(row)
        return tuple(
            Block(
                spot.component,
                spot.block or spot.kind,
                len(found[spot]),
                middle(row.norm for row in found[spot]),
                middle(row.relative for row in found[spot]),
                middle(row.effective_rank for row in found[spot]),
            )
            for spot in sorted(found, key=order_of)
        )

    def to_dict(self) -> dict[str, Any]:
        more = {
            "healthy": self.healthy,
            "layers": len(self.rows),
            "parameters": self.parameters,
            "algorithms": self.algorithms,
            "components": self.components,
            "ranks": _span(row.rank for row in self.rows),
            "alphas": _span(row.alpha for row in self.rows),
            "axes": self.axes,
            "blocks": [asdict(block) for block in self.blocks],
        }
        return {**asdict(self), **more}

    def __str__(self) -> str:
        from nerine.tools.inspect.text import text_of

        return text_of(self)


def middle(values: Iterable[float | None]) -> float | None:
    """The median of those that are there."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _span(values: Iterable[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    return {"min": min(known), "median": median(known), "max": max(known)} if known else None


def _counted(values: Iterable[Any]) -> dict[Any, int]:
    found: dict[Any, int] = {}
    for value in values:
        found[value] = found.get(value, 0) + 1
    return dict(sorted(found.items(), key=lambda item: -item[1]))
