"""Adapter: the one `nn.Module` of the library. It holds the tensors of any algorithm for one layer.

Here, and only here, tensors meet a device, a learned scalar and chance: `forward` gives the parameters as one call
of the layer sees them. It knows no layer: it is handed activations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nerine.algorithms import Algorithm, Design, Params, prefers_weight
from nerine.axes import bind
from nerine.errors import OptionError, ShapeError
from nerine.site import Site

__all__ = ["Adapter", "Noise", "check_strength"]


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Chance during training; each is a probability in [0, 1). None of it acts in eval mode.

    `dropout` zeroes single values of the deviation and `rank_dropout` single ranks (rows of a factor where there is
    no rank), both with the rest scaled up so that the expectation stays. `module_dropout` leaves out the whole
    adapter for a call, without scaling. All are drawn from torch's generator on the device of the activations.
    """

    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("dropout", "rank_dropout", "module_dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, float | int) or not 0 <= value < 1:
                raise OptionError(f"{name} must be a probability in [0, 1), got {value!r}")


def check_strength(value: object) -> None:
    """Raise `OptionError` where `value` is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise OptionError(f"strength must be a finite number, got {value!r}")


class Adapter(nn.Module):
    """The parameters of one algorithm at one layer, under their canonical names ("up", "w1_a", "magnitude", ...).

    `strength` multiplies the deviation: 0 is bitwise the base, 1 the trained adapter, anything else between or beyond.
    `lr` is the learning rate that a rule gave it, or None.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        site: Site,
        params: Params,
        *,
        noise: Noise | None = None,
        strength: float = 1.0,
        lr: float | None = None,
        where: str = "layer",
    ) -> None:
        super().__init__()
        self.algorithm = algorithm
        self.site = site
        self.scale = float(params.scale)
        self.noise = noise or Noise()
        self.strength = float(strength)
        self.lr = lr
        self.where = where
        self.names = tuple(params.tensors)
        for name, tensor in params.tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach()))
        layout = algorithm.layout_of(params.tensors)
        shapes = {name: tuple(t.shape) for name, t in params.tensors.items()}
        sizes = bind(layout, shapes, site.sizes, where)
        self.carrier = layout.carrier
        self.gate_at = layout.gate
        self.prefers_weight = prefers_weight(algorithm.cost(site, Design(layout, sizes)), site.dense)

    def params(self) -> Params:
        """The tensors as they are stored, a learned scalar among them."""
        return Params({name: getattr(self, name) for name in self.names}, self.scale)

    def folded(self) -> Params:
        """The tensors with a learned scalar multiplied into its carrier: what a file holds."""
        tensors = dict(self.params().tensors)
        scalar = tensors.pop("scalar", None)
        if scalar is not None:
            tensors[self.carrier] = tensors[self.carrier] * scalar
        return Params(tensors, self.scale)

    def check_same(self, algorithm: Algorithm, params: Params) -> None:
        """Raise where `params` of `algorithm` cannot take the place of these tensors."""
        own = {name: tuple(t.shape) for name, t in self.folded().tensors.items()}
        new = {name: tuple(t.shape) for name, t in params.tensors.items()}
        axes = getattr(self.algorithm, "axis", None), getattr(algorithm, "axis", None)
        if own != new or axes[0] != axes[1]:
            raise ShapeError(
                f"{self.where}: the adapter is {self.algorithm} with {own}, the file has {algorithm} with {new}. "
                "Attach with the settings of the file, or load it into the model instead"
            )

    def take(self, params: Params) -> None:
        """Copy `params` into these tensors; a learned scalar becomes one, for it is in the carrier already."""
        with torch.no_grad():
            for name, t in params.tensors.items():
                getattr(self, name).copy_(t)
            if "scalar" in self.names:
                getattr(self, "scalar").fill_(1.0)  # noqa: B009
        self.scale = float(params.scale)

    def forward(self, x: Tensor) -> Params:
        """The tensors for a call with the activation `x`: on its device, scalar and rank dropout in them."""
        tensors = dict(self.folded().tensors)
        if any(t.device != x.device for t in tensors.values()):
            tensors = {name: t.to(x.device) for name, t in tensors.items()}
        if self.training and self.noise.rank_dropout:
            name, axis = self.gate_at
            tensors[name] = self._gated(tensors[name], axis)
        return Params(tensors, self.scale)

    def _gated(self, t: Tensor, axis: int) -> Tensor:
        keep = 1 - self.noise.rank_dropout
        gate = torch.rand(t.shape[axis], device=t.device) < keep
        return t * (gate / keep).to(t.dtype).reshape(-1, *[1] * (t.dim() - 1 - axis))

    @property
    def is_plain(self) -> bool:
        """Whether this call is the algorithm's output and nothing else: strength one, no chance on the deviation."""
        return self.strength == 1.0 and not (self.training and (self.noise.dropout or self.noise.module_dropout))

    def weighted(self, deviation: Tensor) -> Tensor:
        """`deviation` with dropout and the strength of this call."""
        if self.training and self.noise.dropout:
            deviation = nn.functional.dropout(deviation, self.noise.dropout)
        return deviation * self.call_strength(deviation)

    def call_strength(self, x: Tensor) -> Tensor | float:
        """The strength of one call; with module dropout a 0-d tensor on the device of `x`."""
        if self.training and self.noise.module_dropout:
            kept = torch.rand((), device=x.device) >= self.noise.module_dropout
            return kept.to(x.dtype) * self.strength
        return self.strength

    def extra_repr(self) -> str:
        return f"{self.algorithm}, strength={self.strength:g}"
