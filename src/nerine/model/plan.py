"""The dry run: what `attach` would do to each layer, without allocating a tensor."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from nerine.algorithms import prefers_weight
from nerine.model.pipeline import HasComponents, as_model
from nerine.model.targets import Targets, What, find_targets
from nerine.site import Site
from nerine.tables import table

__all__ = ["Plan", "PlanRow", "plan"]


@dataclass(frozen=True)
class PlanRow:
    """One layer: what it is, what it gets, and what that costs.

    `cost` is multiply-adds of the adapter per output position over those of the layer; `path` says how it computes:
    "factored" beside the layer, "weight" as one product with the changed weight, "input" as the layer itself on a
    changed input, or "module" through its own forward with a changed weight. In fp32 a "factored" layer of few inputs
    and many positions takes the changed weight as well, where that saves passes over the positions.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    algorithm: str
    tensors: dict[str, tuple[int, ...]]
    params: int
    cost: float
    path: str
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """Rows for the layers that get an adapter, and the reasons of those that do not."""

    rows: tuple[PlanRow, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    base_params: int = 0

    @property
    def params(self) -> int:
        """Number of trained values."""
        return sum(row.params for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": [asdict(row) for row in self.rows],
            "skipped": self.skipped,
            "params": self.params,
            "base_params": self.base_params,
        }

    def __str__(self) -> str:
        rows = [
            (
                r.layer,
                r.kind,
                "x".join(map(str, r.shape)),
                r.algorithm,
                f"{r.params:,}",
                f"{r.cost:.1%}",
                r.path,
                r.note,
            )
            for r in self.rows
        ]
        lines = [table(("layer", "kind", "shape", "algorithm", "params", "cost", "path", "note"), rows)]
        share = f" ({self.params / self.base_params:.2%} of the base)" if self.base_params else ""
        lines.append(f"{len(self.rows)} layers, {self.params:,} trained values{share}")
        lines += [f"left out: {path}: {why}" for path, why in self.skipped.items()]
        return "\n".join(lines)


def plan(model: nn.Module | HasComponents, what: What, *, targets: Targets = "all", train_norm: bool = False) -> Plan:
    """What `attach` with the same arguments would do, layer by layer; the model is not touched.

    Raises:
        TargetError: no layer matches.
        OptionError: `what` is neither an algorithm nor a list of rules.
    """
    model = as_model(model, "plan")
    chosen, skipped = find_targets(model, what, targets, train_norm)
    rows = []
    for target in chosen:
        site, algorithm = target.spot.site, target.algorithm
        design = algorithm.design(site)
        cost, each = algorithm.cost(site, design), max(1, site.experts)
        lead = (site.experts,) if site.experts else ()
        rows.append(
            PlanRow(
                target.spot.path,
                target.kind,
                (*lead, *site.shape),
                str(algorithm),
                {name: (*lead, *shape) for name, shape in design.shapes.items()},
                design.trained * each,
                cost / site.dense,
                _path_of(site, cost, algorithm.acts_on_input(site, design.layout)),
                design.note,
            )
        )
    return Plan(tuple(rows), skipped, sum(p.numel() for p in model.parameters()))


def _path_of(site: Site, cost: int, on_input: bool) -> str:
    if site.opaque:
        return "module"
    if on_input:
        return "input"
    return "weight" if prefers_weight(cost, site.dense) else "factored"
