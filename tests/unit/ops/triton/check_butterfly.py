"""The stages of a butterfly, against `ops.butterfly`."""

from __future__ import annotations

import pytest
import torch

from nerine.ops import butterfly as reference
from nerine.ops.cayley import cayley, skew
from nerine.ops.triton import butterfly


@pytest.mark.parametrize(
    ("stages", "n", "size", "dtype"),
    [
        (1, 1, 4, torch.float32),
        (2, 2, 2, torch.float16),
        (3, 4, 6, torch.float32),
        (1, 4, 10, torch.float32),
        (1, 1, 5, torch.float16),
        (2, 2, 40, torch.float16),
    ],
)
def test_values_and_gradients(stages, n, size, dtype, draw, same):
    t, turns = draw(5, n * size, dtype=dtype), draw(stages, n, size, size, std=0.2, dtype=dtype)
    same(butterfly.butterfly, reference.butterfly, [t, turns])
    same(butterfly.butterfly_deviation, lambda t, turns: reference.butterfly(t, turns) - t, [t, turns])


def test_several_tiles_of_tokens(draw, same):
    same(butterfly.butterfly, reference.butterfly, [draw(2, 18, 4), draw(2, 2, 2, 2, std=0.3)])


def test_the_reference_says_the_same(draw):
    t, turns = draw(5, 12), draw(2, 2, 6, 6, std=0.3)
    wanted = reference.added_by_runs(t, reference.joined_stages(turns), 6)
    torch.testing.assert_close(butterfly.butterfly_deviation(t, turns), wanted, rtol=1e-5, atol=1e-5)


def test_orthogonal_turns_of_an_input_in_fp16(draw, same):
    """As an algorithm has them: turns in fp32, small, of an input in half precision."""
    turns = cayley(skew(draw(2, 2, 6, 6, std=1e-3)))
    same(
        butterfly.butterfly_deviation,
        lambda t, turns: reference.butterfly(t, turns) - t,
        [draw(7, 12, dtype=torch.float16), turns],
    )


def test_strides_and_nothing(draw, same):
    same(
        lambda t, turns: butterfly.butterfly(t.mT, turns.mT),
        lambda t, turns: reference.butterfly(t.mT, turns.mT),
        [draw(8, 3), draw(2, 4, 2, 2, std=0.3)],
    )
    same(butterfly.butterfly, lambda t, turns: t * 1 + 0 * turns.sum(), [draw(0, 8), draw(2, 4, 2, 2)])


def test_what_it_does_not_take(draw):
    assert "at most 64" in butterfly.unsuited(draw(2, 132), draw(1, 2, 66, 66))
    assert "stages of" in butterfly.unsuited(draw(2, 12), draw(1, 3, 4, 4))  # three blocks
    assert "stages of" in butterfly.unsuited(draw(2, 8), draw(3, 2, 4, 4))  # more stages than there are
    assert "stages of" in butterfly.unsuited(draw(2, 6), draw(1, 2, 3, 3))  # an odd size
    assert "stages of" in butterfly.unsuited(draw(2, 9), draw(1, 2, 4, 4))  # other channels


def test_the_operation_is_registered_as_torch_asks(draw):
    torch.library.opcheck(
        torch.ops.nerine.butterfly, (draw(3, 8).requires_grad_(), draw(2, 2, 4, 4).requires_grad_(), True)
    )
