"""What `step.py` measures: the layers, the rows (algorithms), the values of their tensors, and the dense reference.

Every contestant of a row computes the same map from the same tensors; the reference builds the changed weight
(step_maps.py says how).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from step_maps import MAPS, Map, axis_norm
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["DTYPES", "EVAL_GOAL", "GOALS", "LAYERS", "ROWS", "Problem", "Row", "problem", "problem_of"]


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
    "linear-320": (lambda: nn.Linear(320, 320), (4096, 320)),
    "linear-1280": (lambda: nn.Linear(1280, 1280), (1024, 1280)),
    "linear-3072": (lambda: nn.Linear(3072, 3072), (2048, 3072)),
    "linear-4096x11008": (lambda: nn.Linear(4096, 11008), (512, 4096)),
    "conv-320": (lambda: nn.Conv2d(320, 320, 3, padding=1), (4, 320, 32, 32)),
    "conv-1280": (lambda: nn.Conv2d(1280, 1280, 3, padding=1), (1, 1280, 16, 16)),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Forward and backward over those of the frozen layer, in fp32 and eager.
GOALS: dict[str, dict[str, float]] = {
    "linear-3072": {"LoRA": 1.05, "DoRA(LoRA)": 1.10, "LoKr": 1.24, "DoRA(LoKr)": 1.28, "LoHa": 1.27}
    | {"DoRA(LoHa)": 1.35, "IA3": 1.03, "Diag-OFT": 1.08, "BOFT": 1.50, "GLoRA": 1.12, "DyLoRA": 1.06}
    | {"T-LoRA": 1.06, "Full": 1.50},
    "conv-320": dict.fromkeys(ROWS, 1.50),
    "conv-1280": dict.fromkeys(ROWS, 1.50),
}
EVAL_GOAL = 1.05  # of a forward without gradients, everywhere


@dataclass
class Problem:
    """One layer with its input, and what its adapted forms must agree with.

    In bf16 the layer, its input and its output are in bf16, the adapters in fp32, and it runs under autocast.
    """

    layer: nn.Module
    x: Tensor
    grad: Tensor
    precision: str = "fp32"

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")

    def frozen_tensors(self) -> list[Tensor]:
        """What is there whether or not there are adapters."""
        return [self.x, *self.layer.parameters()]

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor:
        return self.layer.bias

    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return functional.linear(x, weight, bias)
        return functional.conv2d(x, weight, bias, self.layer.stride, self.layer.padding)

    def fresh_layer(self) -> nn.Module:
        """A new module around the very same weight and bias, for one contestant."""
        old = self.layer
        with torch.device("meta"):
            if isinstance(old, nn.Linear):
                copy: nn.Module = nn.Linear(old.in_features, old.out_features)
            else:
                copy = nn.Conv2d(old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding)
        copy.weight, copy.bias = self.layer.weight, self.layer.bias
        return copy

    def values(self, row: Row) -> dict[str, Tensor]:
        """Tensors of an adapter in the middle of its training, under nerine's names."""
        rng = torch.Generator().manual_seed(1)

        def draw(std: float, *shape: int) -> Tensor:
            return torch.randn(shape, generator=rng) * std

        values = row.map.values(tuple(self.weight.shape), draw)
        if row.axis is not None:
            norm = axis_norm(self.weight.detach().float(), row.axis)
            values["magnitude"] = norm * (1 + 0.1 * torch.randn(norm.shape, generator=rng))
        return values

    def leaves(self, row: Row) -> dict[str, Tensor]:
        """The same tensors, of which those that are trained ask for a gradient."""
        return {name: t.requires_grad_(name not in row.map.constant) for name, t in self.values(row).items()}

    def reference(self, row: Row) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Output, gradient of x, and gradients of the trained tensors by name, all computed in fp32."""
        values = self.leaves(row)
        changed = row.map.changed(self.weight.float(), values)
        if row.axis is not None:
            changed = changed * (values["magnitude"] / axis_norm(changed, row.axis))
        bias = self.bias.float() + values[row.map.shift] if row.map.shift else self.bias.float()
        x = self.x.detach().float().clone().requires_grad_()
        y = self.op(x, changed, bias)
        y.backward(self.grad.float())
        assert x.grad is not None
        return y.detach(), x.grad, {name: t.grad for name, t in values.items() if t.grad is not None}


def problem(layer: str, precision: str = "fp32") -> Problem:
    """The layer of that name, frozen, with a seeded input that needs its gradient."""
    build, shape = LAYERS[layer]
    return problem_of(build, shape, precision)


def problem_of(build: Callable[[], nn.Module], shape: tuple[int, ...], precision: str = "fp32") -> Problem:
    """The same for any layer, given by what builds it and the shape of its input."""
    torch.manual_seed(0)
    module = build().requires_grad_(False).to(DTYPES[precision])
    x = torch.randn(shape).to(DTYPES[precision])
    with torch.no_grad():
        grad = torch.randn_like(module(x))
    return Problem(module, x.requires_grad_(), grad, precision)
