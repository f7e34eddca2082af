"""What an algorithm is: a differentiable map of weights, `W -> W'`, seen from two sides. Read this file first.

Every algorithm is a *deviation*: zero means unchanged, strength multiplies it, several on one layer add up.

    weight face       weight_deviation(p, W)  =  W' - W             merge, export, and the definition
    activation face   deviation(p, call)      =  op(x, W' - W)      training and inference

`Sandwich` derives both from small pieces that act on the channels; an algorithm writes only the pieces. Settings are
fields of a frozen dataclass and only `design` and `start` read them: the maths reads every size from the tensors, so
a file needs no settings to be read. Nothing here chooses a device or a number format, holds state or reads a file.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from nerine.axes import Layout, Shape, Sizes, Spec, shape_of
from nerine.errors import OptionError, nearest
from nerine.ops.precision import full_precision, same_dtype, wide
from nerine.ops.recompute import contract, replay
from nerine.ops.row_norm import norm_from_square, row_square
from nerine.site import Site

__all__ = [
    "FLOOR",
    "Algorithm",
    "Call",
    "ChangedInput",
    "Design",
    "Params",
    "Sandwich",
    "Strength",
    "prefers_weight",
    "scaled",
    "weight_pays_from",
]

BUILDING = 1.5  # the third product of the weight path and its building, in products of the layer's size (measured)
TOUCH = 45  # multiply-adds in the time in which one entry in memory is read or written (measured, in fp32)
LEAST_PASSES = 15  # over the weight, to build a changed one and to take its gradient apart
T = TypeVar("T")
Strength = Callable[[], Tensor | float] | None  # drawn only by who uses it; None is one

FLOOR = 1e-12  # a row norm is never taken as less than this


class Params(NamedTuple):
    """The tensors of one adapter by name, and `scale`, settled once: alpha / rank, or the bound of a constraint.

    `memo` is there while nobody changes the tensors or the weight and nothing is trained: it keeps what `once` is told.
    """

    tensors: Mapping[str, Tensor]
    scale: float = 1.0
    memo: dict[str, Any] | None = None

    def once(self, name: str, find: Callable[[], T]) -> T:
        """What `find` gives: under this name found a first time only, where there is a memo."""
        if self.memo is None:
            return find()
        if name not in self.memo:
            self.memo[name] = find()
        found: T = self.memo[name]
        return found

    def remembering(self) -> Params:
        """The same with a memo, for one call in which several ask for the same."""
        return self if self.memo is not None else Params(self.tensors, self.scale, {})

    def filled(self, values: Iterable[Tensor]) -> Params:
        """The same adapter with other tensors, given in the order of these."""
        return Params(dict(zip(self.tensors, values, strict=True)), self.scale)

    def replaced(self, **tensors: Tensor) -> Params:
        """The same adapter with some tensors exchanged."""
        return Params({**self.tensors, **tensors}, self.scale)

    def without(self, *names: str) -> Params:
        """The same adapter less some tensors."""
        return Params({name: t for name, t in self.tensors.items() if name not in names}, self.scale)


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
        specs = self.layout.specs
        return sum(math.prod(s) for name, s in self.shapes.items() if specs[name].trained) + self.scalar


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one layer: its site, input, output, bias, and its weight for whoever asks for it.

    `fresh` says that `y` belongs to nobody else yet, so that `Algorithm.output` may add to it in place. `gate`
    `[batch, rank]` switches ranks on and off for each sample (only algorithms that say so are given one).
    """

    site: Site
    x: Tensor
    y: Tensor  # the layer's own output, bias included
    bias: Tensor | None
    weight: Callable[[], Tensor]
    fresh: bool = False
    gate: Tensor | None = None

    @property
    def sink(self) -> Tensor | None:
        """y, where a product can be added to it in place: it is fresh, and the layer is linear."""
        return self.y if self.fresh and self.site.kind == "linear" and self.y.is_contiguous() else None

    def plus(self, d: Tensor) -> Tensor:
        """y + d, in the memory of y where that is nobody else's. Only for the last use of y."""
        return self.y.add_(d) if self.fresh and self.y.dtype == d.dtype else self.y + same_dtype(d, self.y)

    def without_bias(self) -> Tensor:
        """The layer's own output before its bias."""
        if self.bias is None:
            return self.y
        return self.y - same_dtype(self.site.over_channels(self.bias), self.y)


class ChangedInput(NamedTuple):
    """Another input for a layer, and the adapter (if any) that still acts beside it, on that input."""

    x: Tensor
    then: tuple[Algorithm, Params] | None = None


def _fill(init: str, tensor: Tensor, rng: torch.Generator | None) -> Tensor:
    """Fill `tensor` by the name of an initialiser: zeros, ones, kaiming (uniform, gain of a linear layer), normal:σ,
    orthogonal (rows of unit length at right angles, as many as there are dimensions for)."""
    kind, _, value = init.partition(":")
    if kind == "zeros":
        return tensor.zero_()
    if kind == "ones":
        return tensor.fill_(1.0)
    if kind == "kaiming":
        bound = 1 / math.sqrt(max(1, math.prod(tensor.shape[1:])))
        return tensor.uniform_(-bound, bound, generator=rng)
    if kind == "orthogonal":
        return torch.nn.init.orthogonal_(tensor, generator=rng)
    return tensor.normal_(0.0, float(value), generator=rng)


def weight_pays_from(cost: int, site: Site, passes: int) -> float:
    """From how many output positions on a step with the changed weight is cheaper all the same, for it takes its passes
    over the weight and not over every position; infinite where it never is."""
    saved = 3 * cost + TOUCH * passes * site.shape[0] - BUILDING * site.dense  # at each position
    return math.inf if saved <= 0 else TOUCH * max(passes, LEAST_PASSES) * site.dense / saved


def scaled(t: Tensor, scale: float) -> Tensor:
    """t·scale, at no cost where that is one."""
    return t if scale == 1.0 else t * scale


def prefers_weight(cost: int, dense: int) -> bool:
    """Whether one product with the changed weight is cheaper than an activation face of `cost` beside the layer.

    In training the face takes three products (output, gradient to x, gradient to its factors); the changed weight
    takes the layer's own two, one more of the layer's size for the gradient to the deviation, and some passes over
    memory to build it.
    """
    return 3 * cost > BUILDING * dense


@dataclass(frozen=True, kw_only=True)
class Algorithm(ABC):
    """A map of weights. Concrete algorithms are frozen dataclasses whose fields are the settings.

    *May* be overridden: `unsuited`, `start`, `start_of`, `draw`, `gate`, `penalty`, `shift`, `for_file`, `from_file`,
    `complete`, `weight`, `add_to`, `is_fixed`, `output`, `acts_on_input`, `changed_input`, `row_norm`, `column_norm`,
    `size`, `cost`, `fit`, and `deviation` where there is a faster form.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "transposed", "embedding"})
    instead: ClassVar[str] = "; extract as LoRA or LoKr instead"  # why there is no `fit`, and what to do
    passes: ClassVar[int] = 6  # over the outputs, in a training step of the activation face (measured)
    keeps_mean: ClassVar[bool] = True  # whether dropped ranks are made up for by the others

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

    def unsuited(self, site: Site) -> str:
        """Why these settings cannot act at `site`; empty where they can."""
        if site.kind in self.kinds:
            return ""
        article = "an" if site.kind == "embedding" else "a"
        return f"{type(self).__name__} does not act on {article} {site.kind} layer"

    def start_of(self, name: str, spec: Spec, design: Design) -> str:
        """The name of the initialiser of one tensor."""
        return spec.live if design.scalar and spec.init == "zeros" else spec.init

    def start(self, site: Site, weight: Tensor, rng: torch.Generator | None = None) -> Params:
        """Fresh tensors on the device of `weight`, in at least fp32; the deviation they give is zero."""
        design = self.design(site)
        like = wide(weight.new_empty((0,)))
        tensors = {}
        for name, spec in design.layout.specs.items():
            shape = shape_of(spec, design.sizes)
            tensors[name] = _fill(self.start_of(name, spec, design), like.new_empty(shape), rng)
        if design.scalar:
            tensors["scalar"] = like.new_zeros((1,))
        return Params(tensors, design.scale)

    def layout_of(self, names: Iterable[str]) -> Layout:
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

    def from_file(self, p: Params) -> Params:
        """The way back from `for_file`, where these settings say what the tensors were."""
        return p

    def complete(self, p: Params, weight: Tensor) -> tuple[Params, str]:
        """Tensors of another program's file with what it leaves to be worked out from the weight; a note on that."""
        return p, ""

    # -- chance and context --------------------------------------------------------------------------------------
    def draw(self, p: Params, uniform: Callable[[], Tensor]) -> Params:
        """The tensors of one training step where the algorithm itself is random; `uniform` draws a 0-d tensor in
        [0, 1) from torch's generator."""
        return p

    def gate(self, p: Params, timestep: Tensor) -> Tensor | None:
        """The ranks that take part at `timestep` (0-d or `[batch]`), as ones and zeros `[rank]` or `[batch, rank]`;
        None where time plays no role."""
        return None

    def penalty(self, p: Params) -> Tensor | None:
        """What the algorithm asks to have added to the loss, 0-d, or None."""
        return None

    # -- face 1: weights -----------------------------------------------------------------------------------------
    @abstractmethod
    def weight_deviation(self, p: Params, weight: Tensor) -> Tensor:
        """W' - W for `weight` `[out, in/groups, *k]`, in the format of `weight` (at least fp32): the definition."""

    def weight(self, p: Params, weight: Tensor) -> Tensor:
        """W', in at least fp32; *may* be overridden by a form that needs fewer passes."""
        weight = wide(weight)
        return weight + self.weight_deviation(p, weight)

    def add_to(self, total: Tensor, p: Params, weight: Tensor, strength: Tensor | float) -> Tensor:
        """total + strength·(W' - W), in the memory of `total`, which is the caller's own and not that of `weight`
        unless `is_fixed`; *may* be overridden by a form that needs fewer passes."""
        return total.add_(self.weight_deviation(p, weight) * strength)

    def is_fixed(self, p: Params) -> bool:
        """Whether W' - W is the same whatever the weight is."""
        return False

    def shift(self, p: Params) -> Tensor | None:
        """bias' - bias `[out]`, or None where the bias stays."""
        return None

    def size(self, p: Params, weight: Tensor) -> Tensor:
        """|W' - W| over all entries, 0-d, for limits and read-outs; with DoRA that of the inner deviation."""
        size: Tensor = torch.linalg.vector_norm(self.weight_deviation(p, wide(weight)))
        return size

    def fit(self, site: Site, weight: Tensor, target: Tensor) -> Params:
        """The tensors of these settings for which W' comes closest to `target`, or near to that where only an
        iteration finds them; each algorithm says which, and what it is never worse than.

        `weight` and `target` are `[out, in/groups, *k]`; the tensors come in at least fp32. The same input always gives
        the same result. A bias stays as it is.
        Raises:
            OptionError: this algorithm, or one of its settings, is not fitted; the message says what to do instead.
        """
        raise OptionError(f"{type(self).__name__} cannot be fitted to a given weight{self.instead}")

    # -- face 2: activations -------------------------------------------------------------------------------------
    def deviation(self, p: Params, call: Call) -> Tensor:
        """What the adapter adds to the layer's output: op(x, W' - W)."""

        def build(weight: Tensor, *values: Tensor) -> Tensor:
            with full_precision(weight):
                return self.weight_deviation(p.filled(values), wide(weight))

        return self._contract(call, build, [call.weight(), *p.tensors.values()])

    def output(self, p: Params, call: Call) -> Tensor:
        """The layer's output with this adapter alone, at strength one: y + deviation."""
        return call.y + same_dtype(self.deviation(p, call), call.y)

    def acts_on_input(self, site: Site, layout: Layout) -> bool:
        """Whether `changed_input` has something for such tensors at `site`."""
        return False

    def changed_input(
        self, p: Params, site: Site, x: Tensor, weight: Callable[[], Tensor], strength: Strength
    ) -> ChangedInput | None:
        """What to give the layer instead of `x`, so that its own weight gives what W + strength·(W' - W) would give for
        `x`; None where there is no such thing."""
        return None

    @staticmethod
    def _contract(call: Call, build: Callable[..., Tensor], tensors: list[Tensor]) -> Tensor:
        """op(x, build(tensors)), keeping nothing of the weight's size."""
        site = call.site
        return contract(site, call.x, build, tensors, lambda x, *_: site.prepared(x))

    # -- for DoRA, and for the plan ------------------------------------------------------------------------------
    def row_norm(self, p: Params, weight: Tensor) -> Tensor:
        """Norms `[out]` of the rows of W', in at least fp32, differentiable."""

        return self._norms(p, weight, lambda changed: changed)

    def column_norm(self, p: Params, weight: Tensor) -> Tensor:
        """Norms `[in]` of the input channels of W', over outputs and taps, in at least fp32, differentiable."""

        return self._norms(p, weight, lambda changed: changed.transpose(0, 1))

    def _norms(self, p: Params, weight: Tensor, view: Callable[[Tensor], Tensor]) -> Tensor:
        """Norms of the rows of a view of W', of which nothing is kept."""

        def norms(weight: Tensor, *values: Tensor) -> Tensor:
            with full_precision(weight):
                changed = self.weight(p.filled(values), weight)
                return norm_from_square(row_square(view(changed)), FLOOR)

        return replay(norms, weight, *p.tensors.values())

    def cost(self, site: Site, design: Design) -> int:
        """Multiply-adds of `deviation` for one output position; the default forms the dense product."""
        return site.dense


class Sandwich(Algorithm):
    """W' = (I + post)(W(I + pre) + scale·delta), bias' = bias + shift: any algorithm made of channel-wise pieces.

    A subclass writes the pieces that it has and names them in `pieces`; both faces follow.

        pre    on input channels    x -> x + pre(x)       W -> W + W·pre
        delta  beside the weight    y -> y + op(x, delta)  W -> W + delta
        post   on output channels   y -> y + post(y)      W -> W + post(W)
        shift  on the bias          y -> y + shift         bias -> bias + shift
    """

    pieces: ClassVar[frozenset[str]] = frozenset({"delta"})

    def pieces_of(self, p: Params) -> frozenset[str]:
        """The pieces that these tensors have, where they decide."""
        return self.pieces

    def pre(self, p: Params, t: Tensor, transpose: bool = False) -> Tensor:
        """The input piece on `t` `[..., in/groups]`; with `transpose`, its transpose (as it acts on a weight)."""
        raise NotImplementedError

    def delta(self, p: Params, shape: Shape) -> Tensor:
        """The dense piece beside the weight, of `shape` `[out, in/groups, *k]`, scale not applied."""
        raise NotImplementedError

    def post(self, p: Params, t: Tensor) -> Tensor:
        """The output piece on `t` `[..., out]`."""
        raise NotImplementedError

    def is_fixed(self, p: Params) -> bool:
        return self.pieces_of(p) <= {"delta", "shift"}

    def reach(self, p: Params) -> int:
        """How many neighbouring outputs `post` mixes: blocks of this size stay by themselves."""
        return 1

    def _crosses_groups(self, p: Params, site: Site) -> bool:
        """Whether `post` mixes outputs that a grouped convolution makes from different inputs: on the weight that is
        another thing than on the output, and the weight decides."""
        return site.groups > 1 and bool((site.shape[0] // site.groups) % self.reach(p))

    def add(self, p: Params, call: Call) -> Tensor:
        """scale·op(x, delta); *may* be overridden by a factored form, which the tests compare with this one."""
        shape = call.site.shape

        def build(*values: Tensor) -> Tensor:
            with full_precision(values[0]):
                return self.delta(p.filled(values), shape) * p.scale

        return self._contract(call, build, list(p.tensors.values()))

    def output(self, p: Params, call: Call) -> Tensor:
        if "post" in self.pieces_of(p):  # autograd may have kept y for that piece
            return super().output(p, call)
        return call.plus(self.deviation(p, call))

    def weight_deviation(self, p: Params, weight: Tensor) -> Tensor:
        d: Tensor | None = None
        pieces = self.pieces_of(p)
        if "pre" in pieces:
            d = self.pre(p, weight.movedim(1, -1), transpose=True).movedim(-1, 1) * p.scale
        if "delta" in pieces:
            delta = self.delta(p, tuple(weight.shape)) * p.scale
            d = delta if d is None else d + delta
        if "post" in pieces:
            v = weight if d is None else weight + d
            turned = self.post(p, v.movedim(0, -1)).movedim(-1, 0)
            d = turned if d is None else d + turned
        assert d is not None, f"{self.name} has no pieces"
        return d

    def changed_input(
        self, p: Params, site: Site, x: Tensor, weight: Callable[[], Tensor], strength: Strength
    ) -> ChangedInput | None:
        if self.pieces_of(p) != {"pre"} or site.kind == "embedding":
            return None
        turned = self.pre(p, site.channels_last(x).unflatten(-1, (site.groups, -1))).flatten(-2)
        return ChangedInput(x + site.channels_first(turned) * (p.scale * (1 if strength is None else strength())))

    def deviation(self, p: Params, call: Call) -> Tensor:
        d: Tensor | None = None
        site, pieces = call.site, self.pieces_of(p)
        tokens = "pre" in pieces and site.kind == "embedding"  # those are no numbers that could be changed
        if tokens or ("post" in pieces and self._crosses_groups(p, site)):
            return super().deviation(p, call)
        if "pre" in pieces:
            turned = self.pre(p, site.channels_last(call.x).unflatten(-1, (site.groups, -1))).flatten(-2)
            d = site.op(site.channels_first(turned), call.weight()) * p.scale
        if "delta" in pieces:
            delta = self.add(p, call)
            d = delta if d is None else d + delta
        if "post" in pieces:
            y = call.without_bias()
            turned = site.channels_first(self.post(p, site.channels_last(y if d is None else y + d)))
            d = turned if d is None else d + turned
        assert d is not None, f"{self.name} has no pieces"
        return d
