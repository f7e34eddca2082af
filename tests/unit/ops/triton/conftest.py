"""Comparing a kernel with its reference, values and gradients, on the GPU or in Triton's interpreter on the CPU.

Files named check_*.py hold the comparisons; test_kernels.py runs them in a process whose kernels are interpreted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture
def device() -> str:
    """Where kernels run in this process."""
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture
def draw(device: str) -> Callable[..., Tensor]:
    """`draw(*shape)`: normal numbers, in fp16 or bf16 ones that the format has."""
    rng = torch.Generator().manual_seed(7)

    def drawn(*shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, generator=rng)).to(device, dtype)

    return drawn


def apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    assert found.shape == wanted.shape
    if not wanted.numel():
        return 0.0
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-30))


def run(function: Callable[..., Tensor], leaves: Sequence[Tensor], grad: Tensor | None) -> tuple[Tensor, list[Any]]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = function(*leaves)
    if grad is None:
        return y, []
    return y.detach(), list(torch.autograd.grad(y, leaves, grad.to(y.dtype)))


@pytest.fixture
def same() -> Callable[..., None]:
    """`same(kernel, reference, leaves)`: both give the same, and so do their gradients for a random one of the result.

    The reference computes in fp64 on the same numbers, so the tolerance is the kernel's own error.
    """
    rng = torch.Generator().manual_seed(11)

    def check(
        kernel: Callable[..., Tensor],
        reference: Callable[..., Tensor],
        leaves: Sequence[Tensor],
        tolerance: float | None = None,
    ) -> None:
        y, _ = run(kernel, leaves, None)
        limit = tolerance or TOLERANCE[y.dtype]
        grad = torch.randn(y.shape, generator=rng).to(y.device, y.dtype)
        y, grads = run(kernel, leaves, grad)
        wanted, wanted_grads = run(reference, [leaf.double() for leaf in leaves], grad.double())
        assert apart(y, wanted) <= limit
        for i, (leaf, found, right) in enumerate(zip(leaves, grads, wanted_grads, strict=True)):
            assert found.dtype == leaf.dtype, i
            assert torch.isfinite(found).all(), i
            assert apart(found, right) <= limit, i

    return check
