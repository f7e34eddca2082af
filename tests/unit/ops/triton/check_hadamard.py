"""The entrywise product of two low-rank products, against the plain expression, which is LoHa's."""

from __future__ import annotations

import pytest
import torch

import nerine
from nerine.algorithms.base import Params
from nerine.ops.triton import hadamard


def plain(a1, b1, a2, b2, scale=1.0):
    return (a1 @ b1) * (a2 @ b2) * scale


@pytest.mark.parametrize(
    ("rows", "columns", "ranks"),
    [(5, 7, (2, 2)), (64, 64, (16, 16)), (70, 300, (3, 5)), (1, 1, (1, 1)), (9, 65, (20, 1))],
)
def test_values_and_gradients(rows, columns, ranks, draw, same):
    factors = [draw(*shape) for r in ranks for shape in ((rows, r), (r, columns))]
    same(lambda *t: hadamard.hadamard(*t, 0.5), lambda *t: plain(*t, 0.5), factors)


def test_it_is_what_loha_adds(draw):
    names = ("w1_a", "w1_b", "w2_a", "w2_b")
    tensors = dict(zip(names, (draw(6, 2), draw(2, 27), draw(6, 2), draw(2, 27)), strict=True))
    wanted = nerine.LoHa(rank=2).delta(Params(tensors), (6, 3, 3, 3)).flatten(1)
    torch.testing.assert_close(hadamard.hadamard(*tensors.values()), wanted, rtol=1e-5, atol=1e-6)


def test_strides_and_a_gradient_in_half_precision(draw, same):
    same(
        lambda a1, b1, a2, b2: hadamard.hadamard(a1.mT, b1.mT, a2.mT, b2.mT),
        lambda a1, b1, a2, b2: plain(a1.mT, b1.mT, a2.mT, b2.mT),
        [draw(2, 5), draw(9, 2), draw(3, 5), draw(9, 3)],
    )
    same(
        lambda *t: hadamard.hadamard(*t).half(),
        plain,
        [draw(5, 2), draw(2, 9), draw(5, 2), draw(2, 9)],
        tolerance=2e-3,
    )


def test_only_what_needs_a_gradient_gets_one(draw):
    factors = [draw(5, 2), draw(2, 9).requires_grad_(), draw(5, 2), draw(2, 9)]
    hadamard.hadamard(*factors).sum().backward()
    assert [f.grad is None for f in factors] == [True, False, True, True]


def test_what_it_does_not_take(draw):
    assert "at most 32" in hadamard.unsuited(draw(2, 33), draw(33, 3), draw(2, 1), draw(1, 3))
    assert "no two products" in hadamard.unsuited(draw(2, 2), draw(2, 3), draw(3, 2), draw(2, 3))
    assert "no two products" in hadamard.unsuited(draw(0, 2), draw(2, 3), draw(0, 2), draw(2, 3))
    half = draw(2, 2, dtype=torch.float16)
    assert "float32" in hadamard.unsuited(half, half, half, half)


def test_the_operation_is_registered_as_torch_asks(draw):
    factors = [t.requires_grad_() for t in (draw(5, 2), draw(2, 9), draw(5, 2), draw(2, 9))]
    torch.library.opcheck(torch.ops.nerine.hadamard, (*factors, 0.5))
