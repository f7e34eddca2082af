"""`attach`: fresh adapters for the layers that rules choose, and the fitting of any adapters, fresh or from a file."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nerine.algorithms import Algorithm, Params
from nerine.errors import OptionError, ShapeError
from nerine.model.adapter import Adapter, Context, Noise, start
from nerine.model.attach import check_free, put_on
from nerine.model.fast_path import keep_from_fast_paths
from nerine.model.layer import bias_name
from nerine.model.mount import MOUNTS, Spot, adapters_of, mounts_of, weight_at
from nerine.model.network import Network
from nerine.model.offload import Groups, computes_on, present
from nerine.model.pipeline import HasComponents, as_model, part_of
from nerine.model.reports import AttachReport
from nerine.model.saving import guard_saving
from nerine.model.sharded import check_engines, made_alike
from nerine.model.targets import Target, Targets, What, find_targets
from nerine.ops.precision import full_precision

__all__ = ["Fitting", "adapter_for", "attach", "check_name", "fit_in", "fresh", "put_in"]


@dataclass(frozen=True)
class Fitting:
    """An adapter about to be put on: where, what, and with which tensors."""

    spot: Spot
    algorithm: Algorithm
    params: Params
    lr: float | None = None
    strength: float = 1.0


def check_name(model: nn.Module, name: str) -> None:
    """Whether `name` can be given to new adapters of `model`.

    Raises:
        OptionError: it is empty, has a dot, is a word that torch keeps for itself, or is taken.
    """
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise OptionError(f"{name!r} cannot be the name of an adapter: use a word without dots, such as 'style'")
    for holder in model.modules():
        for mount in mounts_of(holder):
            if name in dict(adapters_of(holder, mount)):
                raise OptionError(
                    f"{mount.path} already has an adapter called {name!r}; detach it first, or choose another name"
                )


def attach(
    model: nn.Module | HasComponents,
    what: What,
    *,
    targets: Targets = "all",
    train_norm: bool = False,
    name: str = "default",
    own: bool = True,
    freeze: bool = True,
    dropout: float = 0.0,
    rank_dropout: float = 0.0,
    module_dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> Network:
    """Put fresh adapters on the layers of `model`, a module or a pipeline; at first they change nothing.

    `what` is an algorithm for all `targets`, or rules of which the first that matches a layer wins, as a list or as the
    path of a TOML file. `targets` is a preset ("all": every Linear, Conv and attention block, "full", "attn-mlp",
    "attn-only", ...), a pattern, a class, a predicate, or a list of those; docs/targets.md has them all. `train_norm`
    adds the scales and offsets of all norms. With `own` the adapters are children of their layers and move with them;
    without, the host keeps them through the Network. With `freeze` every other parameter of the model stops to require
    gradients (`detach` undoes it). `generator` draws the initial values instead of torch's global one, where it is: one
    of the CPU gives the same values wherever the model is.

    Raises:
        TargetError: no layer matches, or two share a weight.
        OptionError: a bad setting, or the name is taken. The model is untouched whenever an error is raised.
    """
    noise = Noise(dropout=dropout, rank_dropout=rank_dropout, module_dropout=module_dropout)
    model = as_model(model, "attach")
    check_name(model, name)
    check_engines(model)
    chosen, skipped = find_targets(model, what, targets, train_norm)
    check_engines(model, [(t.spot.path, t.spot.holder) for t in chosen])
    with present(model):
        fittings = [fresh(target, generator) for target in chosen]
    network, frozen = fit_in(model, fittings, name, own=own, freeze=freeze, noise=noise)
    notes = {t.algorithm.design(t.spot.site).note for t in chosen} - {""}
    notes |= _notes_on_places(network)
    notes |= {
        f"shares its weight with {mount.shared_with}: {mount.path}"
        for *_, mount in network._mounts()
        if mount.shared_with
    }
    if dropout:
        closed = [f.spot.path for f in fittings if f.spot.caller is not None]
        notes |= {f"dropout does not act on {path}, whose module shows no output of its own" for path in closed}
    rows = [
        (path, target.kind, str(adapter.algorithm), sum(p.numel() for p in adapter.parameters()))
        for target, (path, _, adapter) in zip(chosen, network.adapters(), strict=True)
    ]
    network.report = AttachReport(tuple(rows), skipped, frozen, tuple(sorted(notes)))
    return network


def fresh(target: Target, generator: torch.Generator | None = None) -> Fitting:
    """A new adapter for a weight that a rule has chosen; at first it changes nothing."""
    spot, rule = target.spot, target.rule
    weight = weight_at(spot.holder, spot).detach()
    with full_precision(weight):
        params = start(target.algorithm, spot.site, weight, generator)
    params = params.filled(made_alike(spot.holder._parameters[spot.attr], params.tensors.values()))
    return Fitting(spot, target.algorithm, params, rule.lr, rule.strength)


def adapter_for(fitting: Fitting, noise: Noise, context: Context, own: bool) -> Adapter:
    """The adapter of a fitting, not on its layer yet."""
    return Adapter(
        fitting.algorithm,
        fitting.spot.site,
        fitting.params,
        noise=noise,
        context=context,
        strength=fitting.strength,
        lr=fitting.lr,
        where=fitting.spot.path,
        belongs=own,
    )


def fit_in(
    model: nn.Module, fittings: Sequence[Fitting], name: str, *, own: bool, freeze: bool, noise: Noise
) -> tuple[Network, int]:
    """Put the adapters on their layers and freeze the rest; returns the handle and how many parameters were frozen."""
    parts = [part_of(model, f.spot.path) for f in fittings]
    contexts = {id(part): Context(model=weakref.ref(part)) for part in parts}
    ready = [(f.spot, adapter_for(f, noise, contexts[id(part)], own)) for f, part in zip(fittings, parts, strict=True)]
    return put_in(model, ready, name, own, freeze)


def put_in(
    model: nn.Module, ready: Sequence[tuple[Spot, Adapter]], name: str, own: bool, freeze: bool
) -> tuple[Network, int]:
    """`fit_in` for adapters that are made already."""
    groups = Groups(model)
    for spot, adapter in ready:
        if (
            adapter.algorithm.shift(adapter.params()) is not None
            and bias_name(spot.attr) not in spot.holder._parameters
        ):
            raise ShapeError(f"{spot.path}: the adapter moves a bias, and this kind of layer has none")
    check_free([spot for spot, _ in ready])
    network = Network(model, [name])
    if freeze:
        others = {
            id(p)
            for holder in model.modules()
            for m in mounts_of(holder)
            for _, a in adapters_of(holder, m)
            for p in a.parameters()
        }
        network._unfreeze = [p for p in model.parameters() if p.requires_grad and id(p) not in others]
        for parameter in network._unfreeze:
            parameter.requires_grad_(False)
    for spot, adapter in ready:
        own_parameter = spot.holder._parameters[spot.attr]
        moved_to = groups.device_of(own_parameter)
        _place(adapter, moved_to or computes_on(spot.holder) or own_parameter.device)  # type: ignore[union-attr]
        adapter.has_moved()  # seen, where it is now
        put_on(spot, name, adapter, own and moved_to is None)
        spot.holder.__dict__[MOUNTS][spot.key].in_group = groups.in_memory(own_parameter)
    holders = {id(spot.holder) for spot, _ in ready}
    network._holders = {p: type(m).__name__ for p, m in model.named_modules() if id(m) in holders}
    _note_shared(model)
    keep_from_fast_paths(model)
    guard_saving(model)
    return network, len(network._unfreeze)


def _place(adapter: Adapter, device: torch.device) -> None:
    """Put a new adapter where its layer computes; what cannot be decided before the base has its weights waits."""
    if device.type != "meta" and adapter.pending != "start":
        adapter.place(device)
    elif not adapter.pending:
        adapter.pending = "place" if adapter.device.type != "meta" else "start"


def _notes_on_places(network: Network) -> set[str]:
    """What is out of the ordinary about where adapters are."""
    placed = list(network.placed())
    notes = set()
    if any(name in mount.loose and adapter.belongs for _, mount, name, adapter in placed):
        notes.add(
            "diffusers moves these layers in groups: the adapters are no child modules of theirs and stay where the "
            "layers compute; network.parameters() has them, model.parameters() does not"
        )
    if any(adapter.pending for *_, adapter in placed):
        notes.add("the base has no weights yet: the adapters get their values at the first call that has some")
    return notes


def _note_shared(model: nn.Module) -> None:
    """Remember which adapted weights other modules have as well: those cannot be merged."""
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(f"{path}.{key}" if path else key)
    for path, holder in model.named_modules():
        for mount in mounts_of(holder):
            same = holders[id(holder._parameters[mount.attr])]
            own = f"{path}.{mount.attr}" if path else mount.attr
            mount.shared_with = next((other for other in same if other != own), "")
