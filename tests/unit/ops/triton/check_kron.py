"""A Kronecker product applied to the channels of a linear layer, against `ops.kron`."""

from __future__ import annotations

import pytest
import torch

from nerine.ops import kron as reference
from nerine.ops.triton import kron


def dense(x, w1, w2, base=None):
    y = x @ reference.kron(w1, w2).mT
    return y if base is None else y + base


@pytest.mark.parametrize(
    ("lead", "one", "two", "dtype"),
    [
        ((5,), (2, 4), (3, 6), torch.float32),
        ((2, 9), (8, 8), (70, 33), torch.float32),
        ((20,), (8, 8), (5, 70), torch.float16),
        ((), (3, 5), (4, 7), torch.float16),
        ((3,), (1, 16), (2, 2), torch.float32),
        ((150,), (1, 1), (5, 66), torch.float32),
        ((4,), (16, 3), (1, 1), torch.float16),
    ],
)
def test_values_and_gradients(lead, one, two, dtype, draw, same):
    x = draw(*lead, one[1] * two[1], dtype=dtype)
    w1, w2 = draw(*one), draw(*two)
    base = draw(*lead, one[0] * two[0], dtype=dtype)
    same(kron.kron_linear, dense, [x, w1, w2])
    same(kron.kron_linear, dense, [x, w1, w2, base])


def test_the_reference_says_the_same(draw):
    x, w1, w2 = draw(2, 3, 12), draw(2, 3), draw(5, 4)
    wanted = (reference.mix_channels(x, w1, -1) @ w2.mT).flatten(-2)
    torch.testing.assert_close(kron.kron_linear(x, w1, w2), wanted, rtol=1e-5, atol=1e-5)


def test_strides_and_nothing(draw, same):
    same(
        lambda x, w1, w2: kron.kron_linear(x.mT, w1.mT, w2.mT),
        lambda x, w1, w2: dense(x.mT, w1.mT, w2.mT),
        [draw(12, 5), draw(3, 2), draw(4, 5)],
    )
    same(kron.kron_linear, dense, [draw(0, 12), draw(2, 3), draw(5, 4)])


def test_an_input_without_a_gradient(draw):
    x, w1, w2 = draw(7, 6), draw(2, 3).requires_grad_(), draw(3, 2).requires_grad_()
    found = torch.autograd.grad(kron.kron_linear(x, w1, w2).square().sum(), [w1, w2])
    wanted = torch.autograd.grad(dense(x, w1, w2).square().sum(), [w1, w2])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_what_it_does_not_take(draw):
    assert "more than 16" in kron.unsuited(draw(2, 34), draw(2, 17), draw(2, 2))
    assert "c·d" in kron.unsuited(draw(2, 5), draw(2, 3), draw(2, 2))
    assert "c·d" in kron.unsuited(draw(2, 54), draw(2, 3), draw(2, 2, 3, 3))
    assert "the base is" in kron.unsuited(draw(2, 6), draw(2, 3), draw(2, 2), draw(2, 5))


def test_the_operation_is_registered_as_torch_asks(draw):
    tensors = [t.requires_grad_() for t in (draw(5, 6), draw(2, 3), draw(3, 2), draw(5, 6))]
    torch.library.opcheck(torch.ops.nerine.kron_linear, tuple(tensors))
