"""Network: the handle on the adapters that one call of `attach` or `load` put into a model.

It holds no tensors of its own (those live in the layers, or in the adapters it keeps for a host), only the list of
layers and the names it commands. Several networks, with several algorithms, may share a model and its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nerine.algorithms import Algorithm, Params
from nerine.errors import MergeError, OptionError, ShapeError, TargetError, nearest
from nerine.model.adapter import Adapter, Noise, check_strength
from nerine.model.attach import (
    Mount,
    adapters_of,
    forget_original,
    merge_layer,
    mount_of,
    put_on,
    take_off,
    unmerge_layer,
)
from nerine.model.layer import kind_of, weight_of
from nerine.model.targets import Match, Rule, Targets, find_targets, matches
from nerine.site import Site
from nerine.tables import table

__all__ = ["AttachReport", "Fitting", "MergeReport", "Network", "attach", "check_name", "fit_in"]


@dataclass(frozen=True)
class AttachReport:
    """What was put where: one row a layer, the layers left out with the reason, and notes."""

    rows: tuple[tuple[str, str, str, int], ...]  # layer, kind, algorithm, trained values
    skipped: Mapping[str, str] = field(default_factory=dict)
    frozen: int = 0  # base parameters that were set to requires_grad=False
    notes: tuple[str, ...] = ()

    @property
    def params(self) -> int:
        return sum(row[3] for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "params": self.params}

    def __str__(self) -> str:
        rows = [(layer, kind, algorithm, f"{params:,}") for layer, kind, algorithm, params in self.rows]
        lines = [table(("layer", "kind", "algorithm", "params"), rows)]
        lines.append(f"{len(self.rows)} layers, {self.params:,} trained values, {self.frozen} base parameters frozen")
        lines += [f"left out: {path}: {why}" for path, why in self.skipped.items()]
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class MergeReport:
    """Rounding of a merge, one row a layer: largest error of a weight, and error over change (both by norm)."""

    rows: tuple[tuple[str, float, float], ...]

    @property
    def largest(self) -> float:
        return max((row[1] for row in self.rows), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        keys = ("layer", "max_error", "relative_error")
        return {"largest": self.largest, "layers": [dict(zip(keys, row, strict=True)) for row in self.rows]}

    def __str__(self) -> str:
        rows = [(layer, f"{error:.2e}", f"{relative:.2e}") for layer, error, relative in self.rows]
        return table(("layer", "largest rounding", "relative to the change"), rows)


@dataclass(frozen=True)
class Fitting:
    """An adapter about to be put on: where, what, and with which tensors."""

    path: str
    layer: nn.Module
    site: Site
    algorithm: Algorithm
    params: Params
    lr: float | None = None
    strength: float = 1.0


class Network:
    """The adapters called `names` in `model`. Made by `attach` and `load`; `Network.of(model)` has all of them.

    `report` says what was done to make it (an `AttachReport` or a `LoadReport`).
    """

    def __init__(self, model: nn.Module, names: Sequence[str], report: Any = None) -> None:
        self.model = model
        self.names = tuple(names)
        self.report = report
        self._unfreeze: list[nn.Parameter] = []

    @classmethod
    def of(cls, model: nn.Module) -> Network:
        """A handle on every adapter in `model`.

        Raises:
            TargetError: there is none.
        """
        names = dict.fromkeys(name for layer in model.modules() if mount_of(layer) for name, _ in adapters_of(layer))
        if not names:
            raise TargetError(f"{type(model).__name__} has no adapters; attach or load one first")
        return cls(model, list(names))

    def __getitem__(self, name: str) -> Network:
        """The handle on one of the names."""
        if name not in self.names:
            raise TargetError(f"no adapter called {name!r}. {nearest(name, self.names)}")
        return Network(self.model, [name])

    # -- what it holds -------------------------------------------------------------------------------------------
    def _layers(self) -> Iterator[tuple[nn.Module, Mount]]:
        for layer in self.model.modules():
            mount = mount_of(layer)
            if mount is not None:
                yield layer, mount

    def adapters(self) -> Iterator[tuple[str, str, Adapter]]:
        """(layer path, adapter name, adapter), in the order of the model."""
        for path, layer in self.model.named_modules():
            if mount_of(layer) is not None:
                for name, adapter in adapters_of(layer):
                    if name in self.names:
                        yield path, name, adapter

    def __len__(self) -> int:
        return sum(1 for _ in self.adapters())

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        return f"Network({', '.join(self.names)}: {len(self)} adapters, {count:,} values)"

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """("<layer>.<tensor>", parameter); with several names "<layer>.<name>.<tensor>"."""
        for path, name, adapter in self.adapters():
            owner = (path, name) if len(self.names) > 1 else (path,)
            for key, parameter in adapter.named_parameters(recurse=False):
                yield ".".join(filter(None, (*owner, key))), parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained tensors, for an optimiser."""
        for _, parameter in self.named_parameters():
            yield parameter

    def param_groups(self, lr: float, lora_plus: float = 1.0) -> list[dict[str, Any]]:
        """Optimiser groups: rules with their own `lr` apart, and with `lora_plus` the factor next to the output
        (LoRA's `up`) at that multiple of the rate (Hayou et al., arXiv:2402.12354)."""
        groups: dict[float, list[nn.Parameter]] = {}
        for _, _, adapter in self.adapters():
            rate = lr if adapter.lr is None else adapter.lr
            for key, parameter in adapter.named_parameters(recurse=False):
                own = rate * lora_plus if key == adapter.carrier else rate
                groups.setdefault(own, []).append(parameter)
        return [{"params": params, "lr": rate} for rate, params in groups.items()]

    def state_dict(self) -> dict[str, Tensor]:
        """Detached tensors under the keys of `named_parameters`."""
        return {key: parameter.detach() for key, parameter in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` (as `state_dict` gave it) into the existing tensors; all keys and shapes must agree.

        Raises:
            ShapeError: keys or shapes differ; nothing was copied then.
        """
        own = dict(self.named_parameters())
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())
            raise ShapeError(f"the state does not belong to this network: {len(odd)} keys differ, for example {odd[0]}")
        for key, parameter in own.items():
            if parameter.shape != state[key].shape:
                raise ShapeError(f"{key}: expected shape {tuple(parameter.shape)}, got {tuple(state[key].shape)}")
        self.not_merged("load tensors")
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(state[key])

    # -- strength, on and off ------------------------------------------------------------------------------------
    @property
    def strength(self) -> float:
        """Strength of the adapters; setting it sets all. With differing strengths reading it is an error."""
        found = {adapter.strength for *_, adapter in self.adapters()}
        if len(found) != 1:
            raise OptionError(f"the adapters have different strengths ({sorted(found)}); read them one by one")
        return found.pop()

    @strength.setter
    def strength(self, value: float) -> None:
        self.set_strength(value)

    def set_strength(self, value: float, match: Match | None = None) -> int:
        """Set the strength of all adapters, or of those at layers that `match`; returns how many were set.

        Raises:
            MergeError: they are merged, so their strength is fixed in the weights.
            TargetError: no layer matches.
        """
        self.not_merged("change the strength")
        check_strength(value)
        modules = dict(self.model.named_modules())
        chosen = [a for path, _, a in self.adapters() if match is None or matches(match, path, modules[path])]
        if not chosen:
            raise TargetError(f"no adapted layer matches {match!r}")
        for adapter in chosen:
            adapter.strength = float(value)
        return len(chosen)

    def off(self) -> None:
        """Switch the adapters off; the model is bitwise the base again (unless they are merged)."""
        self.not_merged("switch off")
        for _, mount in self._layers():
            mount.off.update(self.names)

    def on(self) -> None:
        """Switch the adapters on again."""
        for _, mount in self._layers():
            mount.off.difference_update(self.names)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Without the adapters for the length of a `with` block."""
        before = [(mount, set(mount.off)) for _, mount in self._layers()]
        self.off()
        try:
            yield
        finally:
            for mount, off in before:
                mount.off = off

    # -- merging and taking off ----------------------------------------------------------------------------------
    @property
    def is_merged(self) -> bool:
        """Whether any of the adapters is in the weights now."""
        return any(set(self.names) & set(mount.merged) for _, mount in self._layers())

    def not_merged(self, doing: str) -> None:
        """Raise `MergeError` where the adapters are merged, for work that would have no effect then."""
        if self.is_merged:
            raise MergeError(f"{', '.join(self.names)} is merged into the weights: unmerge first, then {doing}")

    def merge(self, *, keep_original: bool = True) -> MergeReport:
        """Put the adapters into the weights: one sum in at least fp32 a layer, rounded once. The adapters stay as they
        are and rest. With `keep_original` the old bits are kept for `unmerge`, at the price of their memory; without,
        `detach` leaves the merged weights behind.

        Raises:
            MergeError: merged already, not finite, or another active adapter works on a weight that would change.
                The weights are then as they were.
        """
        if self.is_merged:
            raise MergeError(f"{', '.join(self.names)} is merged already; unmerge before merging again")
        names = set(self.names)
        done: list[nn.Module] = []
        rows = []
        try:
            for layer, mount in self._layers():
                if any(name in names and name not in mount.off for name, _ in adapters_of(layer)):
                    largest, relative = merge_layer(layer, names - mount.off)
                    done.append(layer)
                    rows.append((mount.path, largest, relative))
        except BaseException:
            for layer in done:
                unmerge_layer(layer, names)
            raise
        if not keep_original:
            for layer in done:
                forget_original(layer)
        return MergeReport(tuple(rows))

    def unmerge(self) -> None:
        """Give the weights back their exact bits.

        Raises:
            MergeError: nothing is merged, or it was merged with `keep_original=False`.
        """
        if not self.is_merged:
            raise MergeError(f"{', '.join(self.names)} is not merged")
        for layer, _ in self._layers():
            unmerge_layer(layer, set(self.names))

    def detach(self) -> None:
        """Take the adapters off: forward, weights, keys and requires_grad of the model are as before."""
        for layer, _ in list(self._layers()):
            for name in self.names:
                take_off(layer, name)
        for parameter in self._unfreeze:
            parameter.requires_grad_(True)
        self._unfreeze = []

    # -- for hosts that own the network ---------------------------------------------------------------------------
    def to(self, *args: Any, **kwargs: Any) -> Network:
        """Move or cast the adapters alone (`own=True` adapters move with their layers by themselves)."""
        return self._each(lambda adapter: adapter.to(*args, **kwargs))

    def train(self, mode: bool = True) -> Network:
        """Switch dropouts on or off (`own=True` adapters follow their layers by themselves)."""
        return self._each(lambda adapter: adapter.train(mode))

    def eval(self) -> Network:
        return self.train(False)

    def requires_grad_(self, value: bool = True) -> Network:
        return self._each(lambda adapter: adapter.requires_grad_(value))

    def _each(self, act: Callable[[Adapter], object]) -> Network:
        for *_, adapter in self.adapters():
            act(adapter)
        return self


def check_name(model: nn.Module, name: str) -> None:
    """Whether `name` can be given to new adapters of `model`.

    Raises:
        OptionError: it is empty, has a dot, is a word that torch keeps for itself, or is taken.
    """
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise OptionError(f"{name!r} cannot be the name of an adapter: use a word without dots, such as 'style'")
    for layer in model.modules():
        mount = mount_of(layer)
        if mount is not None and name in dict(adapters_of(layer)):
            raise OptionError(
                f"{mount.path} already has an adapter called {name!r}; detach it first, or choose another name"
            )


def attach(
    model: nn.Module,
    what: Algorithm | Sequence[Rule],
    *,
    targets: Targets = "full",
    name: str = "default",
    own: bool = True,
    freeze: bool = True,
    dropout: float = 0.0,
    rank_dropout: float = 0.0,
    module_dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> Network:
    """Put fresh adapters on the layers of `model`; at first they change nothing.

    `what` is an algorithm for all `targets`, or rules of which the first that matches a layer wins. `targets` is a
    preset ("full": every Linear and Conv, "full-lin"), a pattern, a class, a predicate, or a list of those. With
    `own` the adapters are children of their layers and move with them; without, the host keeps them through the
    Network. With `freeze` every other parameter of the model stops to require gradients (`detach` undoes it).
    `generator` draws the initial values instead of torch's global one.

    Raises:
        TargetError: no layer matches, or two share a weight.
        OptionError: a bad setting, or the name is taken. The model is untouched whenever an error is raised.
    """
    noise = Noise(dropout=dropout, rank_dropout=rank_dropout, module_dropout=module_dropout)
    check_name(model, name)
    chosen, skipped = find_targets(model, what, targets)
    fittings = []
    for target in chosen:
        params = target.algorithm.init(target.site, weight_of(target.module).detach(), generator)
        fittings.append(
            Fitting(
                target.path, target.module, target.site, target.algorithm, params, target.rule.lr, target.rule.strength
            )
        )
    network, frozen = fit_in(model, fittings, name, own=own, freeze=freeze, noise=noise)
    notes = {t.algorithm.design(t.site).note for t in chosen} - {""}
    rows = [
        (f.path, kind_of(f.layer), str(f.algorithm), sum(t.numel() for t in f.params.tensors.values()))
        for f in fittings
    ]
    network.report = AttachReport(tuple(rows), skipped, frozen, tuple(sorted(notes)))
    return network


def fit_in(
    model: nn.Module, fittings: Sequence[Fitting], name: str, *, own: bool, freeze: bool, noise: Noise
) -> tuple[Network, int]:
    """Put the adapters on their layers and freeze the rest; returns the handle and how many parameters were frozen."""
    ready = [
        (f, Adapter(f.algorithm, f.site, f.params, noise=noise, strength=f.strength, lr=f.lr, where=f.path))
        for f in fittings
    ]
    network = Network(model, [name])
    if freeze:
        others = {
            id(p) for layer in model.modules() if mount_of(layer) for _, a in adapters_of(layer) for p in a.parameters()
        }
        network._unfreeze = [p for p in model.parameters() if p.requires_grad and id(p) not in others]
        for parameter in network._unfreeze:
            parameter.requires_grad_(False)
    for f, adapter in ready:
        put_on(f.layer, f.path, f.site, name, adapter, own)
    return network, len(network._unfreeze)
