"""Adapter: the one `nn.Module` of the library. It holds the tensors of any algorithm for one layer.

Here, and only here, tensors meet a device, a learned scalar, time and chance: `forward` gives the parameters as one
call of the layer sees them. It knows no layer: it is handed activations.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nerine.algorithms import Algorithm, Design, Params, prefers_weight, weight_pays_from
from nerine.axes import bind
from nerine.errors import OptionError, ShapeError
from nerine.model.offload import computes_on, unhook
from nerine.model.sharded import copy_into, is_split, shape_of, whole
from nerine.ops.kernel_choice import Choice
from nerine.ops.precision import wide
from nerine.site import Site

__all__ = ["Adapter", "Context", "Drawn", "Noise", "check_strength", "start", "weight_deviation"]


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Chance during training; each is a probability in [0, 1). None of it acts in eval mode.

    `dropout` zeroes single values of the deviation and `rank_dropout` single ranks (rows or blocks of a factor where
    there is no rank), both with the rest scaled up so that the expectation stays; where a deviation does not grow with
    its tensors, as in a rotation, ranks are dropped without scaling. `module_dropout` leaves out the whole adapter for
    a call, without scaling. All are drawn from torch's generator on the device of the activations.
    """

    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("dropout", "rank_dropout", "module_dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, float | int) or not 0 <= value < 1:
                raise OptionError(f"{name} must be a probability in [0, 1), got {value!r}")


@dataclass
class Context:
    """What all adapters of a network share: the timesteps of the batch, 0-d or `[batch]`, and whose adapters they are.

    `ranks` is a host's own say in which ranks take part, 1 or 0 each, `[rank]` or `[batch, rank]`; where it gives some
    they count instead of the timesteps. `looks` counts how often the model was searched for engines that move its
    weights, when an adapter had moved.
    """

    timestep: Tensor | None = None
    ranks: Callable[[], Tensor | None] | None = None
    model: weakref.ref[nn.Module] | None = None
    looks: int = 0
    kernels: Choice = field(default_factory=dict)  # see `Network.use_kernels`

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "model": None, "kernels": {}}  # a copy of the adapters belongs to a copy of the model


class Drawn(NamedTuple):
    """The tensors of one call, and the ranks that take part for each sample `[batch, rank]`, where that differs."""

    params: Params
    gate: Tensor | None = None


def check_strength(value: object) -> None:
    """Raise `OptionError` where `value` is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise OptionError(f"strength must be a finite number, got {value!r}")


def start(algorithm: Algorithm, site: Site, weight: Tensor, rng: torch.Generator | None) -> Params:
    """Fresh tensors of `algorithm`; where the parameter holds several experts, one set for each, stacked.

    A generator draws on its own device, and what it drew moves to the weight: one of the CPU gives the same values
    wherever the model is.
    """
    home = weight.device
    if rng is not None and not weight.is_meta:
        weight = weight.to(rng.device)
    made = _start(algorithm, site, weight, rng)
    return made.filled(t.to(home) for t in made.tensors.values())


def _start(algorithm: Algorithm, site: Site, weight: Tensor, rng: torch.Generator | None) -> Params:
    if not site.experts:
        return algorithm.start(site, weight, rng)
    each = [algorithm.start(site, w, rng) for w in weight]
    return Params({name: torch.stack([p.tensors[name] for p in each]) for name in each[0].tensors}, each[0].scale)


def weight_deviation(algorithm: Algorithm, site: Site, p: Params, weight: Tensor) -> Tensor:
    """W' - W for a weight in at least fp32; expert by expert where the parameter holds several."""
    if not site.experts:
        return algorithm.weight_deviation(p, weight)
    return torch.stack([algorithm.weight_deviation(one, w) for one, w in _by_expert(p, weight)])


def _by_expert(p: Params, weight: Tensor) -> Iterator[tuple[Params, Tensor]]:
    """The tensors and the weight of each expert."""
    each = zip(*(t.unbind(0) for t in p.tensors.values()), strict=True)
    for tensors, one in zip(each, weight.unbind(0), strict=True):
        yield p.filled(tensors), one


def _bring_grad_home(parameter: Tensor) -> None:
    """Move a gradient to its parameter, which an engine may have moved between forward and backward.

    The next one will come from that other device again, and then this one has to meet it there.
    """
    grad = parameter.grad
    if grad is None or grad.device == parameter.device:
        return
    parameter.grad = None
    parameter.grad = grad.to(parameter.device)
    if not parameter._backward_hooks:

        def meet(new: Tensor) -> None:
            own = parameter.grad
            if own is not None and own.device != new.device:
                own.data = own.data.to(new.device)

        parameter.register_hook(meet)


def _moved(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """What `Module.to` and its kin make of a tensor, in the number format that it has.

    Real values survive `to_empty` as well, for no checkpoint of the base has them.
    """
    probe = t.new_empty(0)
    there = fn(probe)
    if there is probe:  # done in place, or nothing to do
        return fn(t)
    return torch.empty_like(t, device=there.device) if t.is_meta and not there.is_meta else t.to(there.device)


class Adapter(nn.Module):
    """The parameters of one algorithm at one layer, under their canonical names ("up", "w1_a", "magnitude", ...).

    Constants of the algorithm are buffers. `strength` multiplies the deviation: 0 is bitwise the base, 1 the trained
    adapter, anything else between or beyond. `lr` is the learning rate that a rule gave it, or None.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        site: Site,
        params: Params,
        *,
        noise: Noise | None = None,
        context: Context | None = None,
        strength: float = 1.0,
        lr: float | None = None,
        where: str = "layer",
        belongs: bool = False,
    ) -> None:
        super().__init__()
        self.algorithm = algorithm
        self.site = site
        self.scale = float(params.scale)
        self.noise = noise or Noise()
        self.context = context or Context()
        self.strength = float(strength)
        self.lr = lr
        self.where = where
        self.belongs = belongs
        self.names = tuple(params.tensors)
        self.pending = ""
        self._seen_at = 0
        self.was_split = False  # when its memory was made, after the base had been on meta
        self._first: dict[str, nn.Parameter] = {}
        layout = algorithm.layout_of(params.tensors)
        for name, tensor in params.tensors.items():
            if name == "scalar" or layout.specs[name].trained:
                self.register_parameter(name, nn.Parameter(tensor.detach().contiguous()))
            else:
                self.register_buffer(name, tensor.detach().contiguous())
        lead = 1 if site.experts else 0  # the axis of experts, before those of the layout
        shapes = {name: tuple(t.shape[lead:]) for name, t in params.tensors.items()}
        sizes = bind(layout, shapes, site.sizes, where)
        self.carriers = layout.carriers
        self.gates = tuple((name, axis + lead) for name, axis in layout.gates(bool(site.kernel)))
        if self.noise.rank_dropout and not self.gates:
            raise OptionError(f"{where}: {algorithm} names no axis along which ranks could be dropped (rank_dropout)")
        self._choose_path(algorithm.cost(site, Design(layout, sizes)))
        if any(t.is_meta for t in params.tensors.values()):
            self.pending = "start"
        self._watch(*self._parameters)
        self.draws_itself = getattr(algorithm, "inner", algorithm).__class__.draw is not Algorithm.draw
        self.has_gate = getattr(algorithm, "inner", algorithm).__class__.gate is not Algorithm.gate

    def _choose_path(self, cost: int) -> None:
        """Whether a changed weight may stand in: always, never, or (None) from so many output positions on."""
        self.weight_pays_from = weight_pays_from(cost, self.site, self.algorithm.passes)
        always = prefers_weight(cost, self.site.dense)
        depends = self.site.kind in ("linear", "conv") and math.isfinite(self.weight_pays_from)
        self.prefers_weight: bool | None = None if depends and not always else always

    def takes_weight(self, x: Tensor) -> bool:
        """Whether it does for the activation `x`."""
        if self.prefers_weight is not None:
            return self.prefers_weight
        if torch.compiler.is_compiling():  # which would start again for another number of positions
            return False
        positions = x.numel() // max(1, x.shape[self.site.channel] * math.prod(self.site.stride))
        return positions >= self.weight_pays_from

    def params(self) -> Params:
        """The tensors as they are stored, a learned scalar among them; gathered where an engine has split them."""
        return Params({name: whole(getattr(self, name)) for name in self.names}, self.scale)

    def folded(self) -> Params:
        """The tensors with a learned scalar multiplied into its carriers: what a file holds."""
        p = self.params()
        if "scalar" not in self.names:
            return p
        scalar = p.tensors["scalar"]
        return p.without("scalar").replaced(
            **{name: p.tensors[name] * scalar.reshape(-1, *[1] * (p.tensors[name].dim() - 1)) for name in self.carriers}
        )

    def ready(self, device: torch.device) -> Params:
        """`folded` as algorithms want them: on one device, in at least fp32."""
        p = self.folded()
        if any(t.device != device or t.dtype.itemsize < 4 for t in p.tensors.values()):
            p = p.filled(wide(t).to(device) for t in p.tensors.values())
        return p

    def check_same(self, algorithm: Algorithm, params: Params) -> None:
        """Raise where `params` of `algorithm` cannot take the place of these tensors."""
        own = {name: shape_of(getattr(self, name)) for name in self.names if name != "scalar"}
        new = {name: tuple(t.shape) for name, t in params.tensors.items()}
        axes = getattr(self.algorithm, "axis", None), getattr(algorithm, "axis", None)
        if own != new or axes[0] != axes[1]:
            raise ShapeError(
                f"{self.where}: the adapter is {self.algorithm} with {own}, the file has {algorithm} with {new}. "
                "Attach with the settings of the file, load it into the model instead, or fill a smaller rank with "
                "zeros (swap=True)"
            )

    def take(self, params: Params) -> None:
        """Copy `params` into these tensors; a learned scalar becomes one, for it is in the carrier already."""
        with torch.no_grad():
            for name, t in params.tensors.items():
                own = getattr(self, name)
                self.put(name, t.to(own.dtype) if own.is_meta else t.to(own.device, own.dtype))
            self.pending = "place" if self.pending else ""
            if "scalar" in self.names:
                copy_into(getattr(self, "scalar"), torch.ones(1))  # noqa: B009
        self.scale = float(params.scale)

    # -- where it is ---------------------------------------------------------------------------------------------
    def _watch(self, *names: str) -> None:
        """Keep gradients where their parameters are, and remember the parameters that an optimiser may hold."""
        for name in names:
            parameter = self._parameters[name]
            assert parameter is not None
            self._first[name] = parameter
            parameter.register_post_accumulate_grad_hook(_bring_grad_home)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_first"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._first = {}
        self._watch(*self._parameters)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        """Go where the layer goes, but stay in the own number format: a base that is cast, once or for every call,
        must not round what is trained. `cast` and the methods of `Network` change the format."""
        if self.pending:
            self.was_split = any(is_split(getattr(self, name)) for name in self.names)
        super()._apply(functools.partial(_moved, fn), recurse)
        return self

    def to(self, *args: Any, **kwargs: Any) -> Adapter:
        """Move, and cast as well where a dtype is given: said of the adapter itself it is meant."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        moved = self if device is None else super().to(device)
        return moved if dtype is None else moved.cast(dtype)

    def cast(self, dtype: torch.dtype) -> Adapter:
        """Change the number format of its tensors."""
        super()._apply(lambda t: t.to(dtype))
        return self

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        device: torch.device = getattr(self, self.names[0]).device
        return device

    def has_moved(self) -> bool:
        """Whether the tensors have gone elsewhere since this was asked; never for those of distributed engines."""
        first = next(iter(self._parameters.values()))
        if torch.compiler.is_compiling():
            return False
        if type(first) is not nn.Parameter:
            self._first.clear()
            return False
        before, self._seen_at = self._seen_at, first.data_ptr()
        return before != self._seen_at

    def place(self, device: torch.device) -> None:
        """Move the tensors, if they are elsewhere."""
        if any(getattr(self, name).device != device for name in self.names):
            self.to(device)

    def settle(self, fresh: Params | None, device: torch.device) -> None:
        """Take values that had to wait for a real weight, on its device."""
        for name in self.names:
            own = getattr(self, name)
            value = own if fresh is None else fresh.tensors[name]
            self.put(name, value.detach().to(device, own.dtype))
        self.pending = ""

    def put(self, name: str, value: Tensor) -> None:
        """Copy values into the tensor `name`; one that has no memory yet gets it."""
        own = getattr(self, name)
        if not own.is_meta and own.device == value.device:
            copy_into(own, value)
        elif name in self._parameters:
            self._parameters[name] = nn.Parameter(value.contiguous(), requires_grad=own.requires_grad)
            self._watch(name)
        else:
            self._buffers[name] = value.contiguous()

    def reclaim(self) -> None:
        """Take the tensors back from an engine that handles the adapter as one more layer of the model.

        accelerate puts other parameters in the place of those that it moves; the first ones, which an optimiser may
        hold, return.
        """
        device = computes_on(self)
        values = unhook(self)
        for name in self.names:
            value = values.get(name, getattr(self, name)).detach()
            first = self._first.get(name)
            if first is not None:
                first.data = value
                self._parameters[name] = first
            elif getattr(self, name).is_meta:
                self.put(name, value)
        if device is not None:
            self.place(device)

    # -- one call ------------------------------------------------------------------------------------------------
    def __call__(self, x: Tensor) -> Drawn:
        """`forward`, for ZeRO-3 without its hooks: it would take the tensors away again before the layer is done.

        Met outside of their own module they stay as long as the layer whose forward runs.
        """
        drawn: Drawn = self.forward(x) if hasattr(getattr(self, self.names[0]), "ds_id") else super().__call__(x)
        return drawn

    def forward(self, x: Tensor) -> Drawn:
        """The tensors for a call with the activation `x`: on its device, with scalar, time and chance in them."""
        p = self.ready(x.device)
        if self.training:
            p = self.algorithm.draw(p, lambda: torch.rand((), device=x.device))
            if self.noise.rank_dropout:
                p = self._gated(p, self._dropped(p))
        gate = self._gate(p, x.device) if self.has_gate else None
        if gate is None or gate.dim() > 1:
            return Drawn(p, gate)
        return Drawn(self._gated(p, gate))

    def _gate(self, p: Params, device: torch.device) -> Tensor | None:
        """The ranks that take part in this call, `[rank]` or `[batch, rank]`; None for all."""
        told = self._told()
        if told is not None:
            name, axis = self.gates[0]
            own = p.tensors[name].shape[axis]  # told may be of fewer or more ranks than this layer has
            return nn.functional.pad(told, (0, own - told.shape[-1]), value=1.0).to(device)
        time = self.context.timestep
        return self.algorithm.gate(p, time.to(device)) if self.training and time is not None else None

    def _told(self) -> Tensor | None:
        """What a host says of the ranks; one row for the whole batch is a vector."""
        told = self.context.ranks() if self.context.ranks is not None else None
        return told[0] if told is not None and told.dim() > 1 and len(told) == 1 else told

    @property
    def is_per_sample(self) -> bool:
        """Whether the ranks that take part differ within a batch, so that no one weight stands for the adapter."""
        told, time = self._told() if self.has_gate else None, self.context.timestep
        if told is not None:
            return told.dim() > 1
        return self.training and self.has_gate and time is not None and time.dim() > 0

    def _dropped(self, p: Params) -> Tensor:
        """A random gate over the ranks."""
        name, axis = self.gates[0]
        keep = 1 - self.noise.rank_dropout
        t = p.tensors[name]
        gate = (torch.rand(t.shape[axis], device=t.device) < keep).to(t.dtype)
        return gate / keep if self.algorithm.keeps_mean else gate

    def _gated(self, p: Params, gate: Tensor) -> Params:
        """Every tensor that has a gate, times it."""
        found = {}
        for name, axis in self.gates:
            t = p.tensors[name]
            found[name] = t * gate.reshape(-1, *[1] * (t.dim() - 1 - axis))
        return p.replaced(**found)

    @property
    def is_plain(self) -> bool:
        """Whether this call is the algorithm's output and nothing else: strength one, no chance on the deviation."""
        return self.strength == 1.0 and not (self.training and (self.noise.dropout or self.noise.module_dropout))

    @property
    def draws(self) -> bool:
        """Whether chance takes part in this call."""
        noise = self.noise
        by_chance = bool(noise.dropout or noise.rank_dropout or noise.module_dropout)
        return self.training and (by_chance or self.draws_itself)

    @property
    def has_dropout(self) -> bool:
        """Whether single values of the deviation are dropped in this call."""
        return self.training and bool(self.noise.dropout)

    def weighted(self, deviation: Tensor) -> Tensor:
        """`deviation` with dropout and the strength of this call."""
        if self.has_dropout:
            deviation = nn.functional.dropout(deviation, self.noise.dropout)
        return deviation * self.call_strength(deviation)

    def call_strength(self, x: Tensor) -> Tensor | float:
        """The strength of one call; with module dropout a 0-d tensor on the device of `x`."""
        if self.training and self.noise.module_dropout:
            kept = torch.rand((), device=x.device) >= self.noise.module_dropout
            return kept.to(x.dtype if x.is_floating_point() else torch.float32) * self.strength
        return self.strength

    # -- on weights ----------------------------------------------------------------------------------------------
    def weight_deviation(self, p: Params, weight: Tensor) -> Tensor:
        """W' - W for tensors `p` and a weight in at least fp32; expert by expert where the parameter holds several."""
        return weight_deviation(self.algorithm, self.site, p, weight)

    def size(self, weight: Tensor) -> Tensor:
        """|W' - W| over all entries, 0-d."""
        p = self.ready(weight.device)
        if not self.site.experts:
            return self.algorithm.size(p, weight)
        sizes = [self.algorithm.size(one, w) for one, w in _by_expert(p, weight)]
        whole: Tensor = torch.linalg.vector_norm(torch.stack(sizes))
        return whole

    def shrink(self, factor: Tensor) -> None:
        """Multiply the deviation by a 0-d `factor` through its carriers; of a rotation only roughly."""
        for name in self.carriers:
            t = getattr(self, name)
            copy_into(t, whole(t) * factor.to(t.device, t.dtype))

    def extra_repr(self) -> str:
        return f"{self.algorithm}, strength={self.strength:g}"
