"""Candidates: every weight of a model that could have an adapter, before anybody has chosen among them.

Layers, the projections of attention blocks, and parameters that stand alone where a pattern names them. Rules,
presets and files all speak of these weights, by the paths that are given here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from nerine.errors import OptionError, UnsupportedBase
from nerine.model.layer import is_layer, kind_of, layer_kind, parameter_site, projections, site_of
from nerine.model.mount import Spot
from nerine.model.patterns import means
from nerine.model.pipeline import named_layers
from nerine.site import Site

__all__ = ["Candidate", "candidates_of", "check_rows", "every_spot", "spot_at"]

_log = logging.getLogger("nerine")


@dataclass(frozen=True)
class Candidate:
    """A weight that might be adapted."""

    path: str
    module: nn.Module  # what rules are matched against
    holder: nn.Module
    attr: str = "weight"
    caller: nn.Module | None = None

    @property
    def kind(self) -> str:
        """For tables."""
        return kind_of(self.holder, self.attr)

    @property
    def layer_kind(self) -> str:
        """What its layer computes, by the name that sites use; attention blocks and lone parameters are linear."""
        return layer_kind(self.module) or "linear"

    @property
    def is_lone(self) -> bool:
        """Whether it is a parameter that no layer and no attention block calls."""
        return self.caller is not None and not isinstance(self.caller, nn.MultiheadAttention)

    def spot(self, rows: tuple[int, int] | None) -> Spot:
        """Where the adapter goes.

        Raises:
            UnsupportedBase: this weight cannot be adapted, or not by rows.
        """
        alone = self.caller is not None
        site = parameter_site(self.holder, self.attr, self.path) if alone else site_of(self.holder, self.path)
        if rows is None:
            return Spot(self.path, self.holder, site, self.attr, caller=self.caller)
        check_rows(site, rows, self.path, alone)
        site = site.rows(rows[1] - rows[0])
        return Spot(f"{self.path}[{rows[0]}:{rows[1]}]", self.holder, site, self.attr, rows, self.caller)


def candidates_of(model: nn.Module, patterns: Sequence[str] = ()) -> Iterator[Candidate]:
    """Layers, the projections of attention blocks, and parameters that stand alone where a pattern ends in them."""
    inside: set[int] = set()
    for path, module in named_layers(model):
        if ".nerine" in f".{path}" or id(module) in inside:
            continue
        if isinstance(module, nn.MultiheadAttention):
            inside.update(id(part) for part in module.modules())
            for name, holder, attr in projections(module):
                yield Candidate(f"{path}.{name}" if path else name, module, holder, attr, module)
        elif is_layer(module):
            yield Candidate(path, module, module)
        else:
            for name, parameter in module._parameters.items():
                whole = f"{path}.{name}" if path else name
                if isinstance(parameter, Tensor) and any(means(pattern, whole) for pattern in patterns):
                    yield Candidate(whole, module, module, name, module)


def every_spot(model: nn.Module, rows: Sequence[tuple[int, int]] = ()) -> dict[str, Spot]:
    """All weights that a file might have an adapter for, by path, whole and in each range of `rows` that they have;
    those that cannot be adapted are left out."""
    found = {}
    for candidate in candidates_of(model, ["*"]):
        for part in (None, *rows):
            try:
                spot = candidate.spot(part)
            except (UnsupportedBase, OptionError) as error:
                _log.info("%s", error)
                continue
            found[spot.path] = spot
    return found


def spot_at(spots: Mapping[str, Spot], path: str) -> Spot:
    """The spot of that path; where it names rows of a weight, as in "to_qkv[0:64]", those of the whole weight's."""
    if path in spots:
        return spots[path]
    whole, _, text = path[:-1].rpartition("[")
    start, _, stop = text.partition(":")
    spot = spots[whole]
    rows = (int(start), int(stop))
    check_rows(spot.site, rows, path, spot.caller is not None)
    return replace(spot, path=path, site=spot.site.rows(rows[1] - rows[0]), rows=rows)


def check_rows(site: Site, rows: tuple[int, int], path: str, alone: bool) -> None:
    """Whether an adapter can act on some rows of a weight.

    Raises:
        UnsupportedBase: the layer has no rows that could be taken alone.
        OptionError: it has fewer rows.
    """
    if site.groups > 1 or site.kind not in ("linear", "conv") or site.experts or (site.opaque and not alone):
        raise UnsupportedBase(f"{path}: adapters on some rows need a plain Linear or an ungrouped Conv")
    if rows[1] > site.shape[0]:
        raise OptionError(f"{path}: rows {rows} of a weight that has {site.shape[0]}")
