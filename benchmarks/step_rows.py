"""What `step.py` measures: the layers, the rows (algorithms), the values of their tensors, and the dense reference.

Every contestant of a row computes the same map from the same tensors; the reference builds the changed weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["FACTOR", "GOALS", "LAYERS", "RANK", "ROWS", "Problem", "Row", "problem"]

RANK, FACTOR = 16, 8


@dataclass(frozen=True)
class Row:
    """One algorithm: `kind` is lora, lokr or loha; `axis` is DoRA's, or None without DoRA."""

    kind: str
    axis: str | None = None

    @property
    def name(self) -> str:
        plain = {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa"}[self.kind]
        if self.axis is None:
            return plain
        return f"DoRA({plain})" if self.axis == "out" else f"DoRA({plain}, in)"


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
    "linear-3072": {"LoRA": 1.06, "DoRA(LoRA)": 1.12, "LoKr": 1.28, "DoRA(LoKr)": 1.32, "LoHa": 1.30},
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
        out, inputs, *kernel = self.weight.shape
        flat = self.weight[0].numel()

        def draw(std: float, *shape: int) -> Tensor:
            return torch.randn(shape, generator=rng) * std

        ones = [1] * len(kernel)
        if row.kind == "lora":
            values = {"down": draw(flat**-0.5, RANK, inputs, *kernel), "up": draw(0.02, out, RANK, *ones)}
        elif row.kind == "lokr":
            small = (out // FACTOR, inputs // FACTOR, *kernel)
            values = {"w1": draw(0.3, FACTOR, FACTOR), "w2": draw(0.3 * flat**-0.5, *small)}
        else:
            values = {"w1_a": draw(0.1, out, RANK), "w1_b": draw(1.0, RANK, flat)}
            values |= {"w2_a": draw(0.2 * flat**-0.5, out, RANK), "w2_b": draw(1.0, RANK, flat)}
        if row.axis is not None:
            norm = axis_norm(self.weight.detach(), row.axis)
            values["magnitude"] = norm * (1 + 0.1 * torch.randn(norm.shape, generator=rng))
        return values

    def reference_weight(self, row: Row, values: dict[str, Tensor]) -> Tensor:
        """The changed weight by the definition of each algorithm."""
        t, shape = values, self.weight.shape
        if row.kind == "lora":
            delta = (t["up"].flatten(1) @ t["down"].flatten(1)).reshape(shape)
        elif row.kind == "lokr":
            delta = torch.kron(t["w1"].reshape(*t["w1"].shape, *[1] * (len(shape) - 2)), t["w2"])
        else:
            delta = ((t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"])).reshape(shape)
        changed = self.weight + delta
        return changed if row.axis is None else changed * (t["magnitude"] / axis_norm(changed, row.axis))

    def reference(self, row: Row) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Output, gradient of x, and gradients of the trained tensors by name."""
        values = {name: t.clone().requires_grad_() for name, t in self.values(row).items()}
        x = self.x.detach().clone().requires_grad_()
        y = self.op(x, self.reference_weight(row, values), self.bias)
        y.backward(self.grad)
        assert x.grad is not None
        return y.detach(), x.grad, {name: t.grad for name, t in values.items() if t.grad is not None}


def axis_norm(weight: Tensor, axis: str) -> Tensor:
    """Norms over all axes but one, shaped to multiply the weight."""
    keep = 0 if axis == "out" else 1
    return weight.square().sum([d for d in range(weight.dim()) if d != keep], keepdim=True).sqrt()


def problem(layer: str) -> Problem:
    """The layer of that name, frozen, with a seeded input that needs its gradient."""
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    module = build().requires_grad_(False)
    x = torch.randn(shape)
    with torch.no_grad():
        grad = torch.randn_like(module(x))
    return Problem(module, x.requires_grad_(), grad)
