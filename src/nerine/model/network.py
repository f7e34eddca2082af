"""Network: the handle on the adapters that one call of `attach` or `load` put into a model.

It holds no tensors of its own (those live in the layers, or in the adapters it keeps for a host), only the list of
layers and the names it commands. Several networks, with several algorithms, may share a model and its layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nerine.algorithms import Algorithm, Params
from nerine.errors import MergeError, OptionError, ShapeError, TargetError, nearest
from nerine.model.adapter import Adapter, Context, Noise, check_strength, start
from nerine.model.attach import (
    Mount,
    Spot,
    adapters_of,
    forget_original,
    merge_layer,
    mounts_of,
    put_on,
    take_off,
    unmerge_layer,
    weight_at,
)
from nerine.model.fast_path import keep_from_fast_paths, restore_fast_paths
from nerine.model.layer import bias_name, is_affine
from nerine.model.targets import Match, Rule, Targets, find_targets, matches
from nerine.tables import table

__all__ = ["AttachReport", "Fitting", "MergeReport", "Network", "attach", "check_name", "fit_in"]


@dataclass(frozen=True)
class AttachReport:
    """What was put where: one row a layer, the layers left out with the reason, and notes."""

    rows: tuple[tuple[str, str, str, int], ...]  # layer, kind, algorithm, trained values
    skipped: Mapping[str, str] = field(default_factory=dict)
    frozen: int = 0  # base parameters that were set to requires_grad=False
    notes: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()  # adapted, but not executed while others were

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
        lines += [f"never executed: {path}: its adapter has no effect" for path in self.idle]
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
class MaxNorm:
    """What `Network.max_norm` did: how many adapters it shrank, and mean and largest |W' - W| afterwards."""

    shrunk: int
    mean: float
    largest: float


@dataclass(frozen=True)
class NormReport:
    """One row a layer: |W' - W|, |W|, and the norm of all gradients of its adapter (0 where there are none)."""

    rows: tuple[tuple[str, float, float, float], ...]

    def to_dict(self) -> dict[str, Any]:
        keys = ("layer", "deviation", "weight", "gradient")
        return {"layers": [dict(zip(keys, row, strict=True)) for row in self.rows]}

    def __str__(self) -> str:
        rows = [(path, f"{d:.3g}", f"{w:.3g}", f"{d / max(w, 1e-30):.2%}", f"{g:.3g}") for path, d, w, g in self.rows]
        return table(("layer", "|W' - W|", "|W|", "change", "|gradient|"), rows)


def _norm(tensors: list[Tensor]) -> Tensor:
    """The norm over all entries of all tensors, 0-d."""
    norms = [torch.linalg.vector_norm(t.detach().float()) for t in tensors]
    whole: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return whole


def _grads(adapter: Adapter) -> list[Tensor]:
    grads = [p.grad for p in adapter.parameters() if p.grad is not None]
    return grads or [torch.zeros(1)]


def _numbers(values: Sequence[Tensor]) -> list[float]:
    """0-d tensors as Python floats, with one wait for the device and not one for each."""
    found: list[float] = torch.stack([v.detach().float().to(values[0].device) for v in values]).tolist()
    return found


@dataclass(frozen=True)
class Fitting:
    """An adapter about to be put on: where, what, and with which tensors."""

    spot: Spot
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
        self._report = report
        self._unfreeze: list[nn.Parameter] = []

    @classmethod
    def of(cls, model: nn.Module) -> Network:
        """A handle on every adapter in `model`.

        Raises:
            TargetError: there is none.
        """
        names = dict.fromkeys(
            name for holder in model.modules() for mount in mounts_of(holder) for name, _ in adapters_of(holder, mount)
        )
        if not names:
            raise TargetError(f"{type(model).__name__} has no adapters; attach or load one first")
        return cls(model, list(names))

    def __getitem__(self, name: str) -> Network:
        """The handle on one of the names."""
        if name not in self.names:
            raise TargetError(f"no adapter called {name!r}. {nearest(name, self.names)}")
        return Network(self.model, [name])

    @property
    def report(self) -> Any:
        """What was done to make it; layers that were not executed while others were are named in its `idle`."""
        return None if self._report is None else replace(self._report, idle=self.idle())

    @report.setter
    def report(self, value: Any) -> None:
        self._report = value

    def idle(self) -> tuple[str, ...]:
        """The adapted layers that no forward has executed yet, once one has executed others (compiled ones do not
        count): their adapters learn nothing and change nothing."""
        mounts = [mount for _, mount in self._mounts()]
        return tuple(mount.path for mount in mounts if not mount.has_run) if any(m.has_run for m in mounts) else ()

    # -- what it holds -------------------------------------------------------------------------------------------
    def _mounts(self) -> Iterator[tuple[nn.Module, Mount]]:
        for holder in self.model.modules():
            for mount in mounts_of(holder):
                yield holder, mount

    def adapters(self) -> Iterator[tuple[str, str, Adapter]]:
        """(path of the layer, adapter name, adapter), in the order of the model."""
        for _, mount, name, adapter in self.placed():
            yield mount.path, name, adapter

    def placed(self) -> Iterator[tuple[nn.Module, Mount, str, Adapter]]:
        """The same with the module that holds the weight and its mount, for who works on weights."""
        for holder, mount in self._mounts():
            for name, adapter in adapters_of(holder, mount):
                if name in self.names:
                    yield holder, mount, name, adapter

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
        """Optimiser groups: rules with their own `lr` apart, and with `lora_plus` the tensors that carry the size of
        the deviation (LoRA's `up`) at that multiple of the rate (Hayou et al., arXiv:2402.12354)."""
        groups: dict[float, list[nn.Parameter]] = {}
        for _, _, adapter in self.adapters():
            rate = lr if adapter.lr is None else adapter.lr
            for key, parameter in adapter.named_parameters(recurse=False):
                own = rate * lora_plus if key in adapter.carriers else rate
                groups.setdefault(own, []).append(parameter)
        return [{"params": params, "lr": rate} for rate, params in groups.items()]

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """`named_parameters`, and the constants of algorithms that have some."""
        for path, name, adapter in self.adapters():
            owner = (path, name) if len(self.names) > 1 else (path,)
            for key in adapter.names:
                yield ".".join(filter(None, (*owner, key))), getattr(adapter, key)

    def state_dict(self) -> dict[str, Tensor]:
        """Detached tensors under the keys of `named_tensors`."""
        return {key: tensor.detach() for key, tensor in self.named_tensors()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` (as `state_dict` gave it) into the existing tensors; all keys and shapes must agree.

        Raises:
            ShapeError: keys or shapes differ; nothing was copied then.
        """
        own = dict(self.named_tensors())
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

    # -- training ------------------------------------------------------------------------------------------------
    def set_timestep(self, timestep: Tensor | float | None) -> None:
        """Tell the adapters the timesteps of the coming batch: one number, or one for each sample `[batch]`.

        Only algorithms whose rank follows time (T-LoRA) listen, and only in training. None: all ranks again.
        """
        if timestep is not None and not isinstance(timestep, Tensor):
            timestep = torch.tensor(float(timestep))
        if timestep is not None and timestep.dim() > 1:
            raise ShapeError(f"timestep: expected one number or one for each sample, got shape {tuple(timestep.shape)}")
        for context in {id(a.context): a.context for *_, a in self.adapters()}.values():
            context.timestep = timestep

    def penalty(self) -> Tensor:
        """What the algorithms ask to have added to the loss, weighted as the user sees fit, 0-d: for T-LoRA how far its
        factors are from orthogonal ones (arXiv:2507.05964 §3.3), zero for the others."""
        found = [p for p in (a.algorithm.penalty(a.params()) for *_, a in self.adapters()) if p is not None]
        first = next(self.parameters())
        return torch.stack([p.to(first.device) for p in found]).sum() if found else first.new_zeros(())

    @torch.no_grad()
    def max_norm(self, limit: float) -> MaxNorm:
        """Shrink every adapter whose |W' - W| exceeds `limit`, through the tensors that carry its size; for after an
        optimiser step. With DoRA the inner deviation counts, with a rescaled rotation the rotation.

        Source: `--scale_weight_norms` of sd-scripts, which knows it for LoRA.
        """
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
            raise OptionError(f"max_norm: the limit must be a positive number, got {limit!r}")
        before, after = [], []
        for holder, mount, _, adapter in self.placed():
            if not adapter.carriers:
                raise OptionError(f"{mount.path}: {adapter.algorithm} names no tensor that carries its size")
            weight = weight_at(holder, mount)
            first = size = adapter.size(weight)
            for _ in range(1 if adapter.algorithm.keeps_mean else 6):  # a rotation does not grow in proportion
                adapter.shrink((limit / size).clamp(max=1))
                size = adapter.size(weight)
            before.append(first)
            after.append(size)
        sizes, now = _numbers(before), _numbers(after)
        return MaxNorm(sum(size > limit for size in sizes), sum(now) / len(now), max(now))

    @torch.no_grad()
    def norms(self) -> NormReport:
        """How far each adapter has moved its weight, and the gradients it has now."""
        found = [
            (mount.path, adapter.size(weight_at(h, mount)), _norm([weight_at(h, mount)]), _norm(_grads(adapter)))
            for h, mount, _, adapter in self.placed()
        ]
        columns = [_numbers([row[i] for row in found]) for i in (1, 2, 3)]  # type: ignore[misc]
        return NormReport(tuple(zip((row[0] for row in found), *columns, strict=True)))

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
        chosen = [a for h, m, _, a in self.placed() if match is None or matches(match, m.path, h)]
        if not chosen:
            raise TargetError(f"no adapted layer matches {match!r}")
        for adapter in chosen:
            adapter.strength = float(value)
        return len(chosen)

    def off(self) -> None:
        """Switch the adapters off; the model is bitwise the base again (unless they are merged)."""
        self.not_merged("switch off")
        for _, mount in self._mounts():
            mount.off.update(self.names)

    def on(self) -> None:
        """Switch the adapters on again."""
        for _, mount in self._mounts():
            mount.off.difference_update(self.names)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Without the adapters for the length of a `with` block."""
        before = [(mount, set(mount.off)) for _, mount in self._mounts()]
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
        return any(set(self.names) & set(mount.merged) for _, mount in self._mounts())

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
        done: list[tuple[nn.Module, Mount]] = []
        rows = []
        try:
            for holder, mount in self._mounts():
                if any(name in names and name not in mount.off for name, _ in adapters_of(holder, mount)):
                    largest, relative = merge_layer(holder, mount, names - mount.off)
                    done.append((holder, mount))
                    rows.append((mount.path, largest, relative))
        except BaseException:
            for holder, mount in done:
                unmerge_layer(holder, mount, names)
            raise
        if not keep_original:
            for _, mount in done:
                forget_original(mount)
        return MergeReport(tuple(rows))

    def unmerge(self) -> None:
        """Give the weights back their exact bits.

        Raises:
            MergeError: nothing is merged, or it was merged with `keep_original=False`.
        """
        if not self.is_merged:
            raise MergeError(f"{', '.join(self.names)} is not merged")
        for holder, mount in self._mounts():
            unmerge_layer(holder, mount, set(self.names))

    def detach(self) -> None:
        """Take the adapters off: forward, weights, keys and requires_grad of the model are as before."""
        for module in list(self.model.modules()):
            for name in self.names:
                take_off(module, name)
        restore_fast_paths(self.model)
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
    for holder in model.modules():
        for mount in mounts_of(holder):
            if name in dict(adapters_of(holder, mount)):
                raise OptionError(
                    f"{mount.path} already has an adapter called {name!r}; detach it first, or choose another name"
                )


def attach(
    model: nn.Module,
    what: Algorithm | Sequence[Rule],
    *,
    targets: Targets = "full",
    train_norm: bool = False,
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
    preset ("full": every Linear, Conv and attention block, "full-lin"), a pattern, a class, a predicate, or a list of
    those. `train_norm` adds the scales and offsets of all norms. With
    `own` the adapters are children of their layers and move with them; without, the host keeps them through the
    Network. With `freeze` every other parameter of the model stops to require gradients (`detach` undoes it).
    `generator` draws the initial values instead of torch's global one.

    Raises:
        TargetError: no layer matches, or two share a weight.
        OptionError: a bad setting, or the name is taken. The model is untouched whenever an error is raised.
    """
    noise = Noise(dropout=dropout, rank_dropout=rank_dropout, module_dropout=module_dropout)
    check_name(model, name)
    chosen, skipped = find_targets(model, what, targets, train_norm)
    fittings = []
    for target in chosen:
        spot, rule = target.spot, target.rule
        params = start(target.algorithm, spot.site, weight_at(spot.holder, spot).detach(), generator)
        fittings.append(Fitting(spot, target.algorithm, params, rule.lr, rule.strength))
    network, frozen = fit_in(model, fittings, name, own=own, freeze=freeze, noise=noise)
    notes = {t.algorithm.design(t.spot.site).note for t in chosen} - {""}
    notes |= {
        f"shares its weight with {mount.shared_with}: {mount.path}"
        for _, mount in network._mounts()
        if mount.shared_with
    }
    if dropout:
        notes |= {
            f"dropout does not act on {mount.path}, whose module shows no output of its own"
            for holder, mount in network._mounts()
            if mount.site.opaque and not is_affine(holder)
        }
    rows = [
        (mount.path, target.kind, str(adapter.algorithm), sum(p.numel() for p in adapter.parameters()))
        for target, (_, mount, _, adapter) in zip(chosen, network.placed(), strict=True)
    ]
    network.report = AttachReport(tuple(rows), skipped, frozen, tuple(sorted(notes)))
    return network


def fit_in(
    model: nn.Module, fittings: Sequence[Fitting], name: str, *, own: bool, freeze: bool, noise: Noise
) -> tuple[Network, int]:
    """Put the adapters on their layers and freeze the rest; returns the handle and how many parameters were frozen."""
    context = Context()
    ready = [
        (
            f.spot,
            Adapter(
                f.algorithm,
                f.spot.site,
                f.params,
                noise=noise,
                context=context,
                strength=f.strength,
                lr=f.lr,
                where=f.spot.path,
            ),
        )
        for f in fittings
    ]
    for spot, adapter in ready:
        if (
            adapter.algorithm.shift(adapter.params()) is not None
            and bias_name(spot.attr) not in spot.holder._parameters
        ):
            raise ShapeError(f"{spot.path}: the adapter moves a bias, and this kind of layer has none")
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
        put_on(spot, name, adapter, own)
    _note_shared(model)
    keep_from_fast_paths(model)
    return network, len(network._unfreeze)


def _note_shared(model: nn.Module) -> None:
    """Remember which adapted weights other modules have as well: those cannot be merged."""
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(f"{path}.{key}" if path else key)
    for holder in model.modules():
        for mount in mounts_of(holder):
            same = holders[id(holder._parameters[mount.attr])]
            own = mount.path if mount.attr != "weight" else f"{mount.path}.weight"
            mount.shared_with = (
                next((other for other in same if other != own.split("[")[0]), "") if len(same) > 1 else ""
            )
