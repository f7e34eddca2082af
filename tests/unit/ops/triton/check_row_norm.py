"""The row norms of a weight plus a low-rank product, against `ops.row_norm`."""

from __future__ import annotations

import pytest
import torch

from nerine.errors import OptionError
from nerine.ops import row_norm as reference
from nerine.ops.triton import row_norm


@pytest.mark.parametrize(("rows", "columns", "rank"), [(16, 64, 16), (37, 75, 3), (1, 1, 1), (70, 130, 20)])
def test_values_and_gradients(rows, columns, rank, draw, same):
    same(
        row_norm.low_rank_row_square,
        reference._low_rank,
        [draw(rows, columns), draw(rows, rank), draw(rank, columns)],
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_in_half_precision(dtype, draw, same):
    weight = draw(21, 40, dtype=dtype)
    factors = [draw(21, 4), draw(4, 40)]
    same(
        lambda up, down: row_norm.low_rank_row_square(weight, up, down),
        lambda up, down: reference._low_rank(weight.double(), up, down),
        factors,
    )


def test_a_convolution_and_a_transposed_weight(draw, same):
    for weight in (draw(5, 3, 3, 3), draw(27, 5).mT, draw(10, 54)[::2, ::2]):
        assert not weight.is_contiguous() or weight.dim() == 4
        same(
            lambda up, down, weight=weight: row_norm.low_rank_row_square(weight, up.mT, down.mT),
            lambda up, down, weight=weight: reference._low_rank(weight.double(), up.mT, down.mT),
            [draw(2, 5), draw(27, 2)],
        )


def test_the_root_with_its_floor(draw, same):
    weight, up, down = draw(6, 9), draw(6, 2), draw(2, 9)
    weight[2], up[2] = 0, 0
    for floor in (1e-12, 3.0):
        found = row_norm.low_rank_row_norm(weight, up, down, 0.5, floor)
        torch.testing.assert_close(found, reference.low_rank_row_norm(weight, up, down, 0.5, floor))
    same(
        lambda up, down: row_norm.low_rank_row_norm(weight, up, down, 0.5, 3.0),
        lambda up, down: (weight.double() + 0.5 * up @ down).square().sum(1).clamp_min(9.0).sqrt(),
        [up, down],
    )


def test_a_small_change_of_a_large_weight_is_not_lost(draw):
    weight, up, down = draw(9, 50), draw(9, 2, std=1e-4), draw(2, 50)
    exact = (weight.double() + up.double() @ down.double()).square().sum(1)
    found = row_norm.low_rank_row_square(weight, up, down)
    assert float(((found - exact) / exact).abs().max()) < 5e-7


def test_only_what_needs_a_gradient_gets_one(draw):
    weight, up, down = draw(6, 7), draw(6, 2).requires_grad_(), draw(2, 7)
    row_norm.low_rank_row_square(weight, up, down).sum().backward()
    assert up.grad is not None
    assert down.grad is None
    with torch.no_grad():
        assert not row_norm.low_rank_row_square(weight, up, down).requires_grad


@pytest.mark.parametrize(
    ("shapes", "dtype", "words"),
    [
        (((4, 8), (4, 129), (129, 8)), torch.float32, "at most 128"),
        (((4, 8), (4, 2), (2, 8)), torch.float64, "not float32"),
        (((0, 8), (0, 2), (2, 8)), torch.float32, "empty"),
    ],
)
def test_what_it_does_not_take(shapes, dtype, words, draw):
    tensors = [draw(*shape, dtype=dtype) for shape in shapes]
    assert words in row_norm.unsuited(*tensors)
    with pytest.raises(OptionError, match=words):
        row_norm.low_rank_row_square(*tensors)


def test_the_operation_is_registered_as_torch_asks(draw):
    tensors = draw(5, 9), draw(5, 2).requires_grad_(), draw(2, 9).requires_grad_()
    torch.library.opcheck(torch.ops.nerine.low_rank_row_square, (*tensors, True))
