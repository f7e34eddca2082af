"""What an algorithm is: a differentiable map of weights, `W -> W'`, seen from two sides. Read this file first.

Every algorithm is a *deviation*: zero means unchanged, strength multiplies it, several on one layer add up.

    weight face       weight_deviation(p, W)  =  W' - W             merge, export, and the definition
    activation face   deviation(p, call)      =  op(x, W' - W)      training and inference

`Sandwich` derives both from small pieces that act on the channels; an algorithm writes only the pieces. Settings are
fields of a frozen dataclass and only `design` and `init` read them: the maths reads every size from the tensors, so
a file needs no settings to be read. Nothing here chooses a device or a number format, holds state or reads a file.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nerine.axes import Layout, Shape, Sizes, shape_of
from nerine.errors import OptionError, nearest
from nerine.ops.precision import full_precision, same_dtype, wide
from nerine.ops.recompute import contract, replay
from nerine.ops.row_norm import norm_from_square, row_square
from nerine.site import Site

__all__ = ["FLOOR", "Algorithm", "Call", "Design", "Params", "Sandwich", "prefers_weight"]

BUILDING = 1.5  # the third product of the weight path and its building, in products of the layer's size (measured)
FLOOR = 1e-12  # a row norm is never taken as less than this


class Params(NamedTuple):
    """The tensors of one adapter by name, and `scale` = alpha / rank, settled once (1 where there is none)."""

    tensors: Mapping[str, Tensor]
    scale: float = 1.0


class Design(NamedTuple):
    """What the settings make of a site before anything is allocated."""

    layout: Layout
    sizes: Sizes
    scale: float = 1.0
    scalar: bool = False  # a learned scalar makes the first deviation zero instead of a zero tensor
    note: str = ""  # where a setting could not be followed to the letter

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: shape_of(spec, self.sizes) for name, spec in self.layout.specs.items()}

    @property
    def trained(self) -> int:
        """Number of trained values."""
        return sum(math.prod(shape) for shape in self.shapes.values()) + self.scalar


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one layer: its site, input, output, bias, and its weight for whoever asks for it.

    `fresh` says that `y` belongs to nobody else yet, so that `Algorithm.output` may add to it in place.
    """

    site: Site
    x: Tensor
    y: Tensor  # the layer's own output, bias included
    bias: Tensor | None
    weight: Callable[[], Tensor]
    fresh: bool = False

    @property
    def sink(self) -> Tensor | None:
        """y, where a product can be added to it in place: it is fresh, and the layer is linear."""
        return self.y if self.fresh and self.site.kind == "linear" and self.y.is_contiguous() else None

    def plus(self, d: Tensor) -> Tensor:
        """y + d, in the memory of y where that is nobody else's. Only for the last use of y."""
        return self.y.add_(d) if self.fresh and self.y.dtype == d.dtype else self.y + d

    def without_bias(self) -> Tensor:
        """The layer's own output before its bias."""
        if self.bias is None:
            return self.y
        return self.y - same_dtype(self.site.over_channels(self.bias), self.y)


def _fill(init: str, tensor: Tensor, rng: torch.Generator | None) -> Tensor:
    """Fill `tensor` by the name of an initialiser: zeros, ones, kaiming (uniform, gain of a linear layer), normal:σ."""
    kind, _, value = init.partition(":")
    if kind == "zeros":
        return tensor.zero_()
    if kind == "ones":
        return tensor.fill_(1.0)
    if kind == "kaiming":
        bound = 1 / math.sqrt(max(1, math.prod(tensor.shape[1:])))
        return tensor.uniform_(-bound, bound, generator=rng)
    return tensor.normal_(0.0, float(value), generator=rng)


def prefers_weight(cost: int, dense: int) -> bool:
    """Whether one product with the changed weight is cheaper than an activation face of `cost` beside the layer.

    In training the face takes three products (output, gradient to x, gradient to its factors); the changed weight
    takes the layer's own two, one more of the layer's size for the gradient to the deviation, and some passes over
    memory to build it.
    """
    return 3 * cost > BUILDING * dense


def _plain(x: Tensor, *_: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, kw_only=True)
class Algorithm(ABC):
    """A map of weights. Concrete algorithms are frozen dataclasses whose fields are the settings.

    *May* be overridden: `init`, `for_file`, `output`, `row_norm`, `cost`, and `deviation` where there is a faster form.
    """

    name: ClassVar[str]
    source: ClassVar[str]

    def __new__(cls, *args: Any, **settings: Any) -> Algorithm:
        fields = dataclasses.fields(cls)
        known = [f.name for f in fields]
        positional = [f.name for f in fields if not f.kw_only]
        if len(args) > len(positional):
            example = f"{cls.__name__}({', '.join([*positional, f'{known[len(positional)]}=...'])})"
            raise OptionError(
                f"{cls.__name__}: settings are given by name, as in {example}; got {args[len(positional)]!r}"
            )
        for setting in settings:
            if setting not in known:
                raise OptionError(f"{cls.__name__} has no setting {setting!r}. {nearest(setting, known)}")
        return super().__new__(cls)

    # -- settings ------------------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def layouts(self) -> tuple[Layout, ...]:
        """Every way in which the tensors can stand; told apart by their names."""

    @abstractmethod
    def design(self, site: Site) -> Design:
        """The layout, sizes and scale that the settings give at `site`."""

    def init(self, site: Site, weight: Tensor, rng: torch.Generator | None = None) -> Params:
        """Fresh tensors on the device of `weight`, in at least fp32; the deviation they give is zero."""
        design = self.design(site)
        like = wide(weight.new_empty((0,)))
        tensors = {}
        for name, spec in design.layout.specs.items():
            how = spec.live if design.scalar and spec.init == "zeros" else spec.init
            tensors[name] = _fill(how, like.new_empty(shape_of(spec, design.sizes)), rng)
        if design.scalar:
            tensors["scalar"] = like.new_zeros((1,))
        return Params(tensors, design.scale)

    def layout_of(self, names: Mapping[str, object]) -> Layout:
        """The layout whose tensors are exactly those of `names` (a learned scalar aside)."""
        wanted = set(names) - {"scalar"}
        return next(layout for layout in self.layouts if set(layout.specs) == wanted)

    def settings(self) -> dict[str, Any]:
        """The name and settings as plain data, for files and reports."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"algorithm": self.name, **values}

    def __str__(self) -> str:
        shown = [
            f"{f.name}={value}"
            for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) != f.default or f.name == "rank"
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def for_file(self, p: Params, weight: Tensor) -> Params:
        """The tensors from which any reader of the format computes W'; a learned scalar is in its carrier already."""
        return p

    # -- face 1: weights -----------------------------------------------------------------------------------------
    @abstractmethod
    def weight_deviation(self, p: Params, weight: Tensor) -> Tensor:
        """W' - W for `weight` `[out, in/groups, *k]`, in the format of `weight` (at least fp32): the definition."""

    def weight(self, p: Params, weight: Tensor) -> Tensor:
        """W', in at least fp32; *may* be overridden by a form that needs fewer passes."""
        weight = wide(weight)
        return weight + self.weight_deviation(p, weight)

    # -- face 2: activations -------------------------------------------------------------------------------------
    def deviation(self, p: Params, call: Call) -> Tensor:
        """What the adapter adds to the layer's output: op(x, W' - W)."""
        names = list(p.tensors)

        def build(weight: Tensor, *values: Tensor) -> Tensor:
            with full_precision(weight):
                return self.weight_deviation(Params(dict(zip(names, values, strict=True)), p.scale), wide(weight))

        return self._contract(call, build, [call.weight(), *p.tensors.values()])

    def output(self, p: Params, call: Call) -> Tensor:
        """The layer's output with this adapter alone, at strength one: y + deviation."""
        return call.y + self.deviation(p, call)

    @staticmethod
    def _contract(call: Call, build: Callable[..., Tensor], tensors: list[Tensor]) -> Tensor:
        """op(x, build(tensors)), keeping nothing of the weight's size."""
        site = call.site
        prepare = (lambda x, *_: site.prepared(x)) if site.border else _plain
        return contract(site, call.x, build, tensors, prepare)

    # -- for DoRA, and for the plan ------------------------------------------------------------------------------
    def row_norm(self, p: Params, weight: Tensor) -> Tensor:
        """Norms `[out]` of the rows of W', in at least fp32, differentiable."""
        names = list(p.tensors)

        def rows(weight: Tensor, *values: Tensor) -> Tensor:
            with full_precision(weight):
                changed = self.weight(Params(dict(zip(names, values, strict=True)), p.scale), weight)
                return norm_from_square(row_square(changed), FLOOR)

        return replay(rows, weight, *p.tensors.values())

    def cost(self, site: Site, design: Design) -> int:
        """Multiply-adds of `deviation` for one output position; the default forms the dense product."""
        return site.dense


class Sandwich(Algorithm):
    """W' = (I + post)(W(I + pre) + scale·delta), bias' = bias + shift: any algorithm made of channel-wise pieces.

    A subclass writes the pieces that it has and names them in `pieces`; both faces follow.

        pre    on input channels    x -> x + pre(x)       W -> W + W·pre
        delta  beside the weight    y -> y + op(x, delta)  W -> W + delta
        post   on output channels   y -> y + post(y)      W -> W + post(W)
    """

    pieces: ClassVar[frozenset[str]] = frozenset({"delta"})

    def pre(self, p: Params, t: Tensor, transpose: bool = False) -> Tensor:
        """The input piece on `t` `[..., in/groups]`; with `transpose`, its transpose (as it acts on a weight)."""
        raise NotImplementedError

    def delta(self, p: Params, shape: Shape) -> Tensor:
        """The dense piece beside the weight, of `shape` `[out, in/groups, *k]`, scale not applied."""
        raise NotImplementedError

    def post(self, p: Params, t: Tensor) -> Tensor:
        """The output piece on `t` `[..., out]`."""
        raise NotImplementedError

    def add(self, p: Params, call: Call) -> Tensor:
        """scale·op(x, delta); *may* be overridden by a factored form, which the tests compare with this one."""
        names, shape = list(p.tensors), call.site.shape

        def build(*values: Tensor) -> Tensor:
            with full_precision(values[0]):
                return self.delta(Params(dict(zip(names, values, strict=True)), p.scale), shape) * p.scale

        return self._contract(call, build, list(p.tensors.values()))

    def output(self, p: Params, call: Call) -> Tensor:
        if "post" in self.pieces:  # autograd may have kept y for that piece
            return super().output(p, call)
        return call.plus(self.deviation(p, call))

    def weight_deviation(self, p: Params, weight: Tensor) -> Tensor:
        d: Tensor | None = None
        if "pre" in self.pieces:
            d = self.pre(p, weight.movedim(1, -1), transpose=True).movedim(-1, 1) * p.scale
        if "delta" in self.pieces:
            delta = self.delta(p, tuple(weight.shape)) * p.scale
            d = delta if d is None else d + delta
        if "post" in self.pieces:
            v = weight if d is None else weight + d
            turned = self.post(p, v.movedim(0, -1)).movedim(-1, 0)
            d = turned if d is None else d + turned
        assert d is not None, f"{self.name} has no pieces"
        return d

    def deviation(self, p: Params, call: Call) -> Tensor:
        d: Tensor | None = None
        site = call.site
        if "pre" in self.pieces:
            turned = self.pre(p, site.channels_last(call.x).unflatten(-1, (site.groups, -1))).flatten(-2)
            d = site.op(site.channels_first(turned), call.weight()) * p.scale
        if "delta" in self.pieces:
            delta = self.add(p, call)
            d = delta if d is None else d + delta
        if "post" in self.pieces:
            y = call.without_bias()
            turned = site.channels_first(self.post(p, site.channels_last(y if d is None else y + d)))
            d = turned if d is None else d + turned
        assert d is not None, f"{self.name} has no pieces"
        return d
