"""DoRA: weight decomposition, a map *around* another map.   V = inner(W),   W' = V · m / |V|

The magnitudes m are trained beside the inner adapter; at first m = |W|, so that nothing changes. It wraps any
algorithm: `DoRA(LoKr(rank=8))`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nerine.algorithms.base import FLOOR, Algorithm, Call, ChangedInput, Design, Params, Strength
from nerine.algorithms.settings import check_choice, check_flag
from nerine.axes import Layout, Spec
from nerine.errors import OptionError
from nerine.ops.direction_fit import best_lengths
from nerine.ops.precision import full_precision, same_dtype, wide
from nerine.ops.rescale import gain_of, stretch
from nerine.ops.row_norm import norm_from_square, row_square
from nerine.site import Site

__all__ = ["DoRA"]

_MAGNITUDE = {
    "out": Spec("out 1 *1", "dora_scale", init="ones"),
    "in": Spec("1 in *1", "dora_scale", init="ones"),
}
_SWEEPS = 12  # of a fit
_ENOUGH = 1e-2  # one that takes away less than this share of the error is the last


def _around(layout: Layout, axis: str) -> Layout:
    return replace(layout, specs={"magnitude": _MAGNITUDE[axis], **layout.specs})


@dataclass(frozen=True, kw_only=True)
class DoRA(Algorithm):
    """W' = V·m/|V| with V = W + inner deviation; norms over each output row (`axis="out"`) or input channel ("in").

    m has shape `[out, 1, ...]` or `[1, in, ...]`. With `detach_norm` no gradient flows through |V| (cheaper, as the
    paper proposes in §4.3 and PEFT does; LyCORIS lets it flow). A row whose magnitude is exactly zero - the base row
    is zero - has no direction to keep: there the inner deviation is simply added, so that it can learn.
    Source: Liu et al., arXiv:2402.09353.
    """

    name = "dora"
    source = "Liu et al., arXiv:2402.09353"
    inner: Algorithm = field(kw_only=False)
    axis: str = "out"
    detach_norm: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Algorithm) or isinstance(self.inner, DoRA):
            raise OptionError(f"DoRA goes around another algorithm, as in DoRA(LoRA(rank=16)); got {self.inner!r}")
        check_choice("DoRA", "axis", self.axis, ("out", "in"))
        check_flag("DoRA", detach_norm=self.detach_norm)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return tuple(_around(layout, self.axis) for layout in self.inner.layouts)

    def settings(self) -> dict[str, Any]:
        own = {"axis": self.axis, "detach_norm": self.detach_norm}
        return {"algorithm": self.name, **own, "inner": self.inner.settings()}

    def __str__(self) -> str:
        extra = ", axis='in'" if self.axis == "in" else ""
        return f"DoRA({self.inner}{extra})"

    def unsuited(self, site: Site) -> str:
        return super().unsuited(site) or self.inner.unsuited(site)

    def design(self, site: Site) -> Design:
        inner = self.inner.design(site)
        return inner._replace(layout=_around(inner.layout, self.axis))

    def start(self, site: Site, weight: Tensor, rng: torch.Generator | None = None) -> Params:
        inner = self.inner.start(site, weight, rng)
        with torch.no_grad():
            if self.axis == "out":
                # by the very arithmetic of training, so that m/|V| starts as exactly one
                silent = inner if "scalar" not in inner.tensors else self._silenced(inner)
                norm = self.inner.row_norm(silent, weight)
            else:
                norm = self._norm(wide(weight))
            magnitude = torch.where(norm > FLOOR, norm, 0.0)
        return self._joined(self._view(magnitude, weight.dim()), inner)

    def _silenced(self, inner: Params) -> Params:
        """`inner` as it acts while its learned scalar is still zero."""
        carriers = self.inner.layout_of(inner.tensors).carriers
        return inner.without("scalar").replaced(**{name: inner.tensors[name] * 0 for name in carriers})

    def for_file(self, p: Params, weight: Tensor) -> Params:
        """Other readers have no rule for zero magnitudes: give those rows the norm that they have (the same W')."""
        magnitude, inner = self._split(p)
        if bool((magnitude == 0).any()):
            norm = self._norm(self.inner.weight(inner, weight))
            magnitude = torch.where(magnitude == 0, same_dtype(self._view(norm, weight.dim()), magnitude), magnitude)
        return self._joined(magnitude, self.inner.for_file(inner, weight))

    def from_file(self, p: Params) -> Params:
        magnitude, inner = self._split(p)
        return self._joined(magnitude, self.inner.from_file(inner))

    def complete(self, p: Params, weight: Tensor) -> tuple[Params, str]:
        magnitude, inner = self._split(p)
        inner, note = self.inner.complete(inner, weight)
        return self._joined(magnitude, inner), note

    @property
    def passes(self) -> int:  # type: ignore[override]
        return self.inner.passes + 8

    # -- what the inner algorithm decides --------------------------------------------------------------------------
    @property
    def keeps_mean(self) -> bool:  # type: ignore[override]
        return self.inner.keeps_mean

    def draw(self, p: Params, uniform: Callable[[], Tensor]) -> Params:
        magnitude, inner = self._split(p)
        return self._joined(magnitude, self.inner.draw(inner, uniform))

    def gate(self, p: Params, timestep: Tensor) -> Tensor | None:
        gate = self.inner.gate(self._split(p)[1], timestep)
        if gate is not None and gate.dim() > 1:
            raise OptionError(f"{self}: the norm of a weight is that of the whole batch; give it one timestep (0-d)")
        return gate

    def penalty(self, p: Params) -> Tensor | None:
        return self.inner.penalty(self._split(p)[1])

    def shift(self, p: Params) -> Tensor | None:
        return self.inner.shift(self._split(p)[1])

    def size(self, p: Params, weight: Tensor) -> Tensor:
        return self.inner.size(self._split(p)[1], weight)

    @torch.no_grad()
    def fit(self, site: Site, weight: Tensor, target: Tensor) -> Params:
        """The inner adapter is fitted to the target's directions: in turns to the target, each row multiplied so that
        it lies nearest to that of V, for its length is the magnitude's business."""
        weight, target = wide(weight), wide(target)
        scaled, least, best = target, float("inf"), None
        for _ in range(_SWEEPS):
            inner = self.inner.fit(site, weight, scaled)
            with full_precision(weight):
                v = self.inner.weight(inner, weight)
            found = best_lengths(self._rows(v), self._rows(target), FLOOR)
            if best is not None and found.error > least * (1 - _ENOUGH):
                break
            least, best = found.error, self._joined(self._view(found.magnitude, weight.dim()), inner)
            scaled = target * self._view(found.share, weight.dim())
        assert best is not None
        return best

    # -- pieces --------------------------------------------------------------------------------------------------
    def _view(self, v: Tensor, dims: int) -> Tensor:
        """A vector over the axis, shaped to multiply a weight of `dims` dimensions."""
        return v.reshape(-1, *[1] * (dims - 1)) if self.axis == "out" else v.reshape(1, -1, *[1] * (dims - 2))

    def _norm(self, v: Tensor) -> Tensor:
        """|V| over the axis, as a vector."""
        return norm_from_square(row_square(self._rows(v)), FLOOR)

    def _rows(self, v: Tensor) -> Tensor:
        """`v` with the axis in front."""
        return v if self.axis == "out" else v.transpose(0, 1)

    def _gain(self, magnitude: Tensor, norm: Tensor) -> Tensor:
        """m / |V| as a vector; one where the magnitude is zero."""
        return gain_of(magnitude.reshape(-1), norm.detach() if self.detach_norm else norm)

    @staticmethod
    def _split(p: Params) -> tuple[Tensor, Params]:
        return p.tensors["magnitude"], p.without("magnitude")._replace(memo=p.memo)

    @staticmethod
    def _joined(magnitude: Tensor, inner: Params) -> Params:
        return Params({"magnitude": magnitude, **inner.tensors}, inner.scale)

    def _inner_and_norm(self, p: Params, call: Call) -> tuple[Params, Tensor]:
        """The inner adapter, which may remember for this call what its norm has taken, and |V| over the outputs."""
        inner = self._split(p)[1].remembering()
        return inner, p.once("norm", lambda: self.inner.row_norm(inner, call.weight()))

    # -- the two faces -------------------------------------------------------------------------------------------
    def weight_deviation(self, p: Params, weight: Tensor) -> Tensor:
        magnitude, inner = self._split(p)
        d = self.inner.weight_deviation(inner, weight)
        v = weight + d
        gain = self._gain(magnitude, self._norm(v))
        return d + self._view(gain - 1, weight.dim()) * v

    def weight(self, p: Params, weight: Tensor) -> Tensor:
        magnitude, inner = self._split(p)
        v = self.inner.weight(inner, weight)
        return v * self._view(self._gain(magnitude, self._norm(v)), weight.dim())

    def deviation(self, p: Params, call: Call) -> Tensor:
        if self.axis == "in":
            return super().deviation(p, call)
        inner, norm = self._inner_and_norm(p, call)
        gain = self._gain(p.tensors["magnitude"], norm)
        d = self.inner.deviation(inner, call)
        return d + same_dtype(call.site.over_channels(gain - 1), d) * (call.without_bias() + d)

    def output(self, p: Params, call: Call) -> Tensor:
        """m/|V| · (y + d) + (1 - m/|V|) · bias: one pass over the output of the inner adapter."""
        if self.axis == "in":
            return super().output(p, call)
        inner, norm = self._inner_and_norm(p, call)
        norm = norm.detach() if self.detach_norm else norm
        magnitude = p.tensors["magnitude"].reshape(-1)
        return stretch(self.inner.output(inner, call), magnitude, norm, call.bias, call.site.channel)

    def acts_on_input(self, site: Site, layout: Layout) -> bool:
        return self.axis == "in" and site.kind != "embedding"

    def changed_input(
        self, p: Params, site: Site, x: Tensor, weight: Callable[[], Tensor], strength: Strength
    ) -> ChangedInput | None:
        """Scaled columns of V are a scaled input of V = W + inner deviation."""
        if strength is not None or not self.acts_on_input(site, self.layouts[0]):
            return None
        magnitude, inner = self._split(p)
        norm = p.once("column norm", lambda: self.inner.column_norm(inner, weight()))
        gain = self._gain(magnitude, norm).repeat(site.groups)
        return ChangedInput(x * same_dtype(site.over_channels(gain), x), (self.inner, inner))

    def cost(self, site: Site, design: Design) -> int:
        if self.axis == "in" and site.kind == "embedding":
            return site.dense
        builds = type(self.inner).row_norm is Algorithm.row_norm and self.axis == "out"  # the changed weight, for |V|
        return site.dense if builds else min(site.dense, self.inner.cost(site, design) * 3 // 2)
