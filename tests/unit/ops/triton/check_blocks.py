"""Blocks of channels times a small matrix each, against `ops.blocks`."""

from __future__ import annotations

import pytest
import torch

from nerine.ops import blocks as reference
from nerine.ops.triton import blocks


def plain(t, matrices, offset=None):
    n, size, _ = matrices.shape
    y = torch.einsum("tns,nsr->tnr", t.reshape(-1, n, size), matrices).reshape(t.shape)
    return y if offset is None else y + offset


@pytest.mark.parametrize(
    ("lead", "n", "size", "dtype"),
    [
        ((3,), 2, 4, torch.float32),
        ((2, 40), 3, 5, torch.float32),
        ((), 1, 16, torch.float16),
        ((70,), 1, 20, torch.float16),
        ((4,), 1, 64, torch.float32),
        ((5,), 4, 1, torch.float32),
    ],
)
def test_values_and_gradients(lead, n, size, dtype, draw, same):
    t = draw(*lead, n * size, dtype=dtype)
    matrices, offset = draw(n, size, size, dtype=dtype), draw(n * size, dtype=dtype)
    same(blocks.turn_channels, plain, [t, matrices])
    same(blocks.turn_channels, plain, [t, matrices, offset])


def test_matrices_in_fp32_for_an_input_in_fp16(draw, same):
    same(blocks.turn_channels, plain, [draw(9, 12, dtype=torch.float16), draw(3, 4, 4), draw(12)], tolerance=2e-3)


def test_the_reference_says_the_same(draw):
    t, matrices, offset = draw(6, 12), draw(3, 4, 4), draw(12)
    torch.testing.assert_close(
        blocks.turn_channels(t, matrices, offset), reference.turn_channels(t, matrices, offset), rtol=1e-5, atol=1e-6
    )


def test_strides_and_nothing(draw, same):
    same(
        lambda t, m, o: blocks.turn_channels(t.mT, m.mT, o[::2]),
        lambda t, m, o: plain(t.mT, m.mT, o[::2]),
        [draw(12, 5), draw(3, 4, 4), draw(24)],
    )
    same(blocks.turn_channels, plain, [draw(0, 12), draw(3, 4, 4), draw(12)])


def test_an_input_without_a_gradient(draw):
    t, matrices = draw(7, 6), draw(2, 3, 3).requires_grad_()
    blocks.turn_channels(t, matrices).sum().backward()
    wanted = t.reshape(7, 2, 3).sum(0)[:, :, None].expand(-1, -1, 3)
    torch.testing.assert_close(matrices.grad, wanted, rtol=1e-5, atol=1e-6)


def test_what_it_does_not_take(draw):
    assert "at most 64" in blocks.unsuited(draw(2, 65), draw(1, 65, 65))
    assert "8 channels" in blocks.unsuited(draw(2, 8), draw(3, 4, 4))
    assert "neither" in blocks.unsuited(draw(2, 8), draw(2, 4, 4, dtype=torch.float16))


def test_the_operation_is_registered_as_torch_asks(draw):
    tensors = [t.requires_grad_() for t in (draw(5, 8), draw(2, 4, 4), draw(8))]
    torch.library.opcheck(torch.ops.nerine.turn_channels, tuple(tensors))
