"""Every layer of a change looked at once: its size, its directions, and what adapters could make of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nerine.algorithms import REGISTRY, Algorithm, LoRA
from nerine.errors import FormatError
from nerine.files.detect import dialect_named
from nerine.files.folder import open_adapter
from nerine.model.patterns import Match
from nerine.ops.precision import wide
from nerine.site import Site
from nerine.tools.exact import brought, change_in
from nerine.tools.extract.choice import choose
from nerine.tools.extract.fitting import LEAST, seen
from nerine.tools.extract.noise import square
from nerine.tools.extract.options import Case, Catalogue, catalogue
from nerine.tools.extract.pairs import is_layer, pair_up
from nerine.tools.extract.plan import Plan
from nerine.tools.extract.prices import price_of
from nerine.tools.progress import Progress
from nerine.tools.weights import Weights, open_weights, read_adapter

__all__ = ["Changed", "Layer", "changes_of", "study"]

BASELESS = ("lora", "loha", "lokr", "full")  # what is fitted to a change alone, whatever the weight is
ENDLESS = 2**62

PathLike = str | os.PathLike[str]


class Changed(NamedTuple):
    """The change of one layer `[out, in, *k]`, and its weight where it is at hand."""

    path: str
    site: Site
    change: Tensor
    weight: Tensor | None


@dataclass(frozen=True)
class Layer:
    """What is known of a layer once its tensors are gone.

    `change` is |D|², `weight` |W|² or None; `directions` is the effective rank, exp of the entropy of the shares
    σ²/Σσ²; `options` are those of each algorithm, by its name, the first of which is to have nothing.
    """

    path: str
    site: Site
    change: float
    weight: float | None
    directions: float
    options: Mapping[str, Catalogue]


@contextmanager
def changes_of(
    base: PathLike | None,
    tuned: PathLike | None,
    adapter: PathLike | None,
    *,
    targets: Match | Sequence[Match],
    component: str | None,
    allow_pickle: bool,
    device: str | torch.device,
    progress: Progress,
) -> Iterator[tuple[Iterator[Changed], bool]]:
    """The changes of all layers that have one, read when their turn comes; and whether their weights are known."""
    if adapter is None:
        assert base is not None
        assert tuned is not None
        with open_weights(base, allow_pickle=allow_pickle) as a, open_weights(tuned, allow_pickle=allow_pickle) as b:
            yield _between(a, b, targets, device, progress), True
    elif base is None:
        yield _of_adapter(adapter, None, component, allow_pickle, device, progress), False
    else:
        with open_weights(base, allow_pickle=allow_pickle) as a:
            yield _of_adapter(adapter, a, component, allow_pickle, device, progress), True


def _between(
    base: Weights, tuned: Weights, targets: Match | Sequence[Match], device: str | torch.device, progress: Progress
) -> Iterator[Changed]:
    pairs = pair_up(base, tuned)
    pairs.check()
    choice = choose(pairs, Plan(LoRA(), (), None), targets, False)
    for i, path in enumerate(choice.algorithms):
        progress(i, len(choice.algorithms), path)
        found = seen(choice.pairs[path], device)
        if found.change is not None:
            yield Changed(path, choice.pairs[path].site, found.change, found.weight)


def _of_adapter(
    adapter: PathLike,
    base: Weights | None,
    component: str | None,
    allow_pickle: bool,
    device: str | torch.device,
    progress: Progress,
) -> Iterator[Changed]:
    with open_adapter(adapter, allow_pickle=allow_pickle) as source:
        layers = read_adapter(source, base, component=component).layers
        for i, (path, layer) in enumerate(layers.items()):
            progress(i, len(layers), path)
            if layer.site.experts or layer.site.kind == "norm" or (base is not None and not is_layer(base, path)):
                continue
            weight = None if base is None else wide(base.weight(path)).to(device)
            change = change_in(brought(layer, path, device), None if weight is None else partial(_same, weight), path)
            if bool(change.any()):
                yield Changed(path, layer.site, change, weight)


def _same(weight: Tensor) -> Tensor:
    return weight


def study(changes: Iterator[Changed], algos: Sequence[str], dialect: str, dtype: torch.dtype) -> list[Layer]:
    """All layers, one after the other.

    Raises:
        FormatError: there is none.
    """
    chosen = dialect_named(dialect)
    plans = {name: Plan(LoRA(), (REGISTRY[name](),), None) for name in algos}
    found = []
    for path, site, change, weight in changes:
        price = price_of(chosen.stem_text(path), path, dtype)
        case = Case(site, torch.zeros_like(change) if weight is None else weight, change, price)
        options = {name: catalogue(case, plan, ENDLESS, _holds_all) for name, plan in plans.items()}
        shares = case.values.square() / case.values.square().sum()
        entropy = -(shares * shares.clamp_min(LEAST).log()).sum()
        size = None if weight is None else square(weight)
        found.append(Layer(path, site, case.total, size, float(entropy.exp()), options))
    if not found:
        raise FormatError("nothing has changed, so there is nothing to suggest; are these the files that were meant?")
    return found


def _holds_all(algorithm: Algorithm) -> bool:
    return False
