"""The Tucker-2 form of a kernel: what it has of such form comes back, and what each rank keeps is told beforehand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nerine.ops.tucker import tucker
from nerine.ops.tucker_fit import kept_squares, leading_tucker, tucker_of

SHAPES = [(12, 7, 3, 3), (5, 9, 3), (6, 4, 2, 3, 2), (20, 2, 3, 3)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_directions_together_are_the_kernel(shape: tuple[int, ...]) -> None:
    kernel = normal(*shape)
    up, core, down = tucker_of(kernel)
    torch.testing.assert_close(tucker(core, up, down), kernel)
    torch.testing.assert_close(up.mT @ up, torch.eye(shape[0], dtype=torch.float64))
    torch.testing.assert_close(down @ down.mT, torch.eye(shape[1], dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_a_rank_keeps_is_what_its_form_has(shape: tuple[int, ...]) -> None:
    kernel = normal(*shape)
    kept = kept_squares(kernel)
    assert len(kept) == max(shape[:2])
    for rank in range(1, len(kept) + 1):
        up, core, down = leading_tucker(kernel, rank)
        assert (up.shape, core.shape, down.shape) == (
            (shape[0], rank),
            (rank, rank, *shape[2:]),
            (rank, shape[1]),
        )
        rest = (kernel - tucker(core, up, down)).square().sum()
        torch.testing.assert_close(kernel.square().sum() - kept[rank - 1], rest, atol=1e-9, rtol=1e-9)


def test_a_kernel_of_that_form_comes_back() -> None:
    up, core, down = normal(12, 3, seed=1), normal(3, 3, 3, 3, seed=2), normal(3, 7, seed=3)
    kernel = tucker(core, up, down)
    assert float(kept_squares(kernel)[1]) < 0.99 * float(kernel.square().sum())  # two ranks would not do
    torch.testing.assert_close(tucker(*_in_order(leading_tucker(kernel, 3))), kernel)
    torch.testing.assert_close(
        tucker(*_in_order(leading_tucker(kernel.float(), 3))), kernel.float(), rtol=1e-4, atol=1e-4
    )


def _in_order(form: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    up, core, down = form
    return core, up, down


def test_its_size_is_shared_out_between_the_three() -> None:
    sizes = [float(torch.linalg.vector_norm(t)) for t in leading_tucker(normal(12, 7, 3, 3) * 1e-4, 4)]
    assert max(sizes) < 4 * min(sizes)


def test_nothing_gives_nothing() -> None:
    for t in leading_tucker(torch.zeros(6, 4, 3, 3), 2):
        assert not bool(t.isnan().any())
    up, core, down = leading_tucker(torch.zeros(6, 4, 3, 3), 2)
    assert not bool(tucker(core, up, down).any())
