"""The Cayley transform of small blocks, against `ops.cayley`."""

from __future__ import annotations

import pytest
import torch

from nerine.ops import cayley as reference
from nerine.ops.triton import cayley


@pytest.mark.parametrize(("lead", "size"), [((3,), 4), ((2, 2), 5), ((1,), 1), ((), 7), ((2,), 16), ((1,), 17)])
@pytest.mark.parametrize("std", [1e-3, 1.0])
def test_values_and_gradients(lead, size, std, draw, same):
    """In fp64 the reference is exact; 1e-5 of the largest entry is fp32's own precision for these turns."""
    same(
        lambda b: cayley.cayley(reference.skew(b)),
        lambda b: reference.cayley(reference.skew(b)),
        [draw(*lead, size, size, std=std)],
    )


def test_a_whole_block_of_64(draw, same):
    same(
        lambda b: cayley.cayley(reference.skew(b)),
        lambda b: reference.cayley(reference.skew(b)),
        [draw(1, 64, 64, std=0.1)],
    )


@pytest.mark.parametrize("std", [1e-4, 1.0, 30.0])
def test_it_is_as_exact_as_the_reference(std, draw):
    """Small turns, large ones, and nearly half a circle, where pivots must be searched for."""
    q = reference.skew(draw(4, 8, 8, std=std))
    exact = reference.cayley(q.double())
    found, theirs = cayley.cayley(q), reference.cayley(q)
    assert (found - exact).abs().amax() <= 4 * (theirs - exact).abs().amax() + 1e-6 * exact.abs().amax()
    eye = torch.diag_embed(torch.ones_like(exact[..., 0]))
    turn = found + eye
    assert (turn @ turn.mT - eye).abs().amax() < 1e-5


def test_the_gradient_takes_any_input_not_only_skew_ones(draw, same):
    same(cayley.cayley, reference.cayley, [draw(2, 6, 6, std=0.1)])


def test_transposed_blocks_and_none(draw, same):
    same(lambda q: cayley.cayley(q.mT), lambda q: reference.cayley(q.mT), [reference.skew(draw(3, 5, 5))])
    assert cayley.cayley(draw(0, 4, 4)).shape == (0, 4, 4)


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((2, 65, 65), torch.float32, "at most 64"),
        ((2, 4, 5), torch.float32, "square"),
        ((2, 4, 4), torch.float16, "not float32"),
    ],
)
def test_what_it_does_not_take(shape, dtype, words, draw):
    assert words in cayley.unsuited(draw(*shape, dtype=dtype))


def test_the_operation_is_registered_as_torch_asks(draw):
    torch.library.opcheck(torch.ops.nerine.cayley, (reference.skew(draw(2, 4, 4)).requires_grad_(),))
