"""What `step.py` measures: the layers, the rows (algorithms), the values of their tensors, and the dense reference.

Every contestant of a row computes the same map from the same tensors; the reference builds the changed weight
(step_maps.py says how).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from step_maps import MAPS, Map, axis_norm
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["GOALS", "LAYERS", "ROWS", "Problem", "Row", "problem"]


@dataclass(frozen=True)
class Row:
    """One algorithm: `kind` is its name in `MAPS`; `axis` is DoRA's, or None without DoRA."""

    kind: str
    axis: str | None = None

    @property
    def map(self) -> Map:
        return MAPS[self.kind]

    @property
    def name(self) -> str:
        if self.axis is None:
            return self.map.name
        return f"DoRA({self.map.name})" if self.axis == "out" else f"DoRA({self.map.name}, in)"


ROWS = {
    row.name: row
    for row in (
        Row("lora"),
        Row("lora", "out"),
        Row("lokr"),
        Row("lokr", "out"),
        Row("loha"),
        Row("loha", "out"),
        Row("lora", "in"),
        Row("dylora"),
        Row("tlora"),
        Row("glora"),
        Row("full"),
        Row("ia3"),
        Row("ia3-input"),
        Row("diag-oft"),
        Row("diag-oft", "out"),
        Row("boft"),
        Row("oft-v2"),
    )
}

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear-1280": (lambda: nn.Linear(1280, 1280), (1024, 1280)),
    "linear-3072": (lambda: nn.Linear(3072, 3072), (2048, 3072)),
    "conv-320": (lambda: nn.Conv2d(320, 320, 3, padding=1), (4, 320, 32, 32)),
}

# Forward and backward over those of the frozen layer, fp32.
GOALS: dict[str, dict[str, float]] = {
    "linear-1280": {"LoRA": 1.10, "DoRA(LoRA)": 1.16, "LoKr": 1.40, "DoRA(LoKr)": 1.45, "LoHa": 1.65},
    "linear-3072": {"LoRA": 1.06, "DoRA(LoRA)": 1.12, "LoKr": 1.28, "DoRA(LoKr)": 1.32, "LoHa": 1.30}
    | {"DyLoRA": 1.12, "T-LoRA": 1.12, "GLoRA": 1.15, "Full": 1.60, "IA3": 1.05, "IA3 (input)": 1.05}
    | {"Diag-OFT": 1.12, "BOFT": 1.60},
    "conv-320": dict.fromkeys(ROWS, 1.60),
}


@dataclass
class Problem:
    """One layer with its input, and what its adapted forms must agree with."""

    layer: nn.Module
    x: Tensor
    grad: Tensor

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor:
        return self.layer.bias

    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return functional.linear(x, weight, bias)
        return functional.conv2d(x, weight, bias, padding=self.layer.padding)

    def fresh_layer(self) -> nn.Module:
        """A new module around the very same weight and bias, for one contestant."""
        with torch.device("meta"):
            if isinstance(self.layer, nn.Linear):
                copy: nn.Module = nn.Linear(self.layer.in_features, self.layer.out_features)
            else:
                copy = nn.Conv2d(self.layer.in_channels, self.layer.out_channels, 3, padding=self.layer.padding)
        copy.weight, copy.bias = self.layer.weight, self.layer.bias
        return copy

    def values(self, row: Row) -> dict[str, Tensor]:
        """Tensors of an adapter in the middle of its training, under nerine's names."""
        rng = torch.Generator().manual_seed(1)

        def draw(std: float, *shape: int) -> Tensor:
            return torch.randn(shape, generator=rng) * std

        values = row.map.values(tuple(self.weight.shape), draw)
        if row.axis is not None:
            norm = axis_norm(self.weight.detach(), row.axis)
            values["magnitude"] = norm * (1 + 0.1 * torch.randn(norm.shape, generator=rng))
        return values

    def leaves(self, row: Row) -> dict[str, Tensor]:
        """The same tensors, of which those that are trained ask for a gradient."""
        return {name: t.requires_grad_(name not in row.map.constant) for name, t in self.values(row).items()}

    def reference(self, row: Row) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Output, gradient of x, and gradients of the trained tensors by name."""
        values = self.leaves(row)
        changed = row.map.changed(self.weight, values)
        if row.axis is not None:
            changed = changed * (values["magnitude"] / axis_norm(changed, row.axis))
        bias = self.bias + values[row.map.shift] if row.map.shift else self.bias
        x = self.x.detach().clone().requires_grad_()
        y = self.op(x, changed, bias)
        y.backward(self.grad)
        assert x.grad is not None
        return y.detach(), x.grad, {name: t.grad for name, t in values.items() if t.grad is not None}


def problem(layer: str) -> Problem:
    """The layer of that name, frozen, with a seeded input that needs its gradient."""
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    module = build().requires_grad_(False)
    x = torch.randn(shape)
    with torch.no_grad():
        grad = torch.randn_like(module(x))
    return Problem(module, x.requires_grad_(), grad)
