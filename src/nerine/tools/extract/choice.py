"""Which layers of two checkpoints are to have an adapter, and by which algorithm or rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nerine.algorithms import Algorithm, Full
from nerine.model.patterns import Match
from nerine.model.targets import find_targets
from nerine.tools.extract.pairs import Pair, Pairs, is_layer
from nerine.tools.extract.plan import Plan

__all__ = ["Choice", "choose"]


@dataclass(frozen=True)
class Choice:
    """The chosen layers in the order of the model, the algorithm that the rules give each, and {layer: why not}."""

    pairs: Mapping[str, Pair]
    algorithms: Mapping[str, Algorithm]
    left: Mapping[str, str]
    train_norm: bool = False

    @property
    def weights(self) -> list[str]:
        """Those that are no normalisation."""
        return [path for path in self.algorithms if self.pairs[path].site.kind != "norm"]

    @property
    def norms(self) -> list[str]:
        return [path for path in self.algorithms if self.pairs[path].site.kind == "norm"]


def choose(pairs: Pairs, plan: Plan, targets: Match | Sequence[Match], train_norm: bool) -> Choice:
    """The layers that the targets mean; embeddings too where all of the model is wanted in full.

    Raises:
        TargetError: they mean none.
    """
    found, left = find_targets(pairs.model, plan.what, targets, train_norm)
    algorithms = {target.spot.path: target.algorithm for target in found}
    if isinstance(plan.what, Full) and targets == "all":
        algorithms |= {path: plan.what for path, pair in pairs.layers.items() if pair.site.kind == "embedding"}
    known = {path: algorithms[path] for path in pairs.layers if path in algorithms}
    others = [path for path in pairs.layers if is_layer(pairs.base, path) and path not in {*known, *left}]
    reasons = {**left, **dict.fromkeys(others, "not among the targets")}
    return Choice({path: pairs.layers[path] for path in known}, known, reasons, train_norm)
