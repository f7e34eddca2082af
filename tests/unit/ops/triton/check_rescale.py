"""A scale and an offset for each channel, against `ops.rescale`."""

from __future__ import annotations

import pytest
import torch

from nerine.ops import rescale as reference
from nerine.ops.triton import rescale


def plain(u, gain, offset, channel):
    ones = [1] * (-1 - channel)
    return u * gain.reshape(-1, *ones) + offset.reshape(-1, *ones)


@pytest.mark.parametrize(
    ("shape", "channel", "dtype"),
    [
        ((3, 5), -1, torch.float32),
        ((2, 9, 130), -1, torch.float32),
        ((40, 16), -1, torch.float16),
        ((7,), -1, torch.bfloat16),
        ((2, 3, 5, 7), -3, torch.bfloat16),
        ((2, 3, 5, 7), -3, torch.float16),
        ((2, 3, 33, 35), -3, torch.float32),
    ],
)
def test_values_and_gradients(shape, channel, dtype, draw, same):
    n = shape[channel]
    same(
        lambda *t: rescale.rescale(*t, channel),
        lambda *t: plain(*t, channel),
        [draw(*shape, dtype=dtype), draw(n, dtype=dtype), draw(n, dtype=dtype)],
    )


def test_the_reference_says_the_same(draw):
    u, gain, offset = draw(4, 6), draw(6), draw(6)
    wanted = reference.rescale(u, gain, offset, -1)
    torch.testing.assert_close(rescale.rescale(u, gain, offset, -1), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("shape", "channel"), [((3, 5), -1), ((2, 3, 5, 7), -3)])
def test_stretch(shape, channel, draw, same):
    """Against its formula, and its own reference, with a magnitude of zero; a small gain counts in half precision."""
    n = shape[channel]
    u, magnitude, norm, bias = draw(*shape), draw(n), 1 + draw(n).abs(), draw(n)
    magnitude[1] = 0
    ones = [1] * (-1 - channel)

    def plainly(u, magnitude, norm, *bias):
        gain = torch.where(magnitude == 0, 1.0, magnitude / norm).reshape(-1, *ones)
        moved = bias[0].reshape(-1, *ones) if bias else 0.0
        return moved + gain * (u - moved)

    def ours(u, magnitude, norm, *bias):
        return rescale.stretch(u, magnitude, norm, *(bias or (None,)), channel)

    for more in ((), (bias,)):
        same(ours, plainly, [u, magnitude, norm, *more])
        wanted = reference.stretch(u, magnitude, norm, *(more or (None,)), channel)
        torch.testing.assert_close(ours(u, magnitude, norm, *more), wanted, rtol=1e-5, atol=1e-5)
    half, near = u.half(), norm * (1 + 1e-4 * draw(n))
    wanted = plainly(half.double(), near.double(), norm.double(), bias.double())
    assert torch.equal(ours(half, near, norm, bias), wanted.half())


def test_strides(draw, same):
    """Transposed, channels-last, every second; and the gradient of a sum, which is expanded."""
    for leaf, view, channel in (
        (draw(6, 8), lambda u: u.mT, -1),
        (draw(2, 4, 3, 5), lambda u: u.permute(0, 3, 1, 2), -3),
        (draw(2, 5, 4, 6), lambda u: u[..., ::2], -3),
    ):
        n = view(leaf).shape[channel]
        for end in (lambda y: y, lambda y: y.sum((0, 1))):
            same(
                lambda u, g, o, view=view, channel=channel, end=end: end(rescale.rescale(view(u), g, o, channel)),
                lambda u, g, o, view=view, channel=channel, end=end: end(plain(view(u), g, o, channel)),
                [leaf, draw(n), draw(n)],
            )


@pytest.mark.parametrize(("shape", "channel"), [((0, 5), -1), ((0, 3, 4, 4), -3), ((2, 3, 0, 4), -3)])
def test_nothing(shape, channel, draw, same):
    n = shape[channel]
    same(
        lambda *t: rescale.rescale(*t, channel),
        lambda *t: plain(*t, channel),
        [draw(*shape), draw(n), draw(n)],
    )


def test_gain_and_offset_in_fp32_beside_half_precision(draw, same):
    for shape, channel in (((3, 5), -1), ((2, 5, 3, 4), -3)):
        same(
            lambda *t, channel=channel: rescale.rescale(*t, channel),
            lambda *t, channel=channel: plain(*t, channel),
            [draw(*shape, dtype=torch.float16), draw(5), draw(5)],
        )


def test_an_input_without_a_gradient(draw):
    u, gain, offset = draw(4, 5), draw(5).requires_grad_(), draw(5).requires_grad_()
    rescale.rescale(u, gain, offset, -1).square().sum().backward()
    y = u * gain.detach() + offset.detach()
    torch.testing.assert_close(gain.grad, (2 * y * u).sum(0))
    torch.testing.assert_close(offset.grad, (2 * y).sum(0))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((2, 3), 3, 3, 0), "no dimension"),
        (((2, 3), 4, 3, -1), "for 3 channels"),
        (((2, 0), 0, 0, -1), "for 0 channels"),
    ],
)
def test_what_it_does_not_take(arguments, words, draw):
    shape, gain, offset, channel = arguments
    assert words in rescale.unsuited(draw(*shape), draw(gain), draw(offset), channel)
    half = draw(3, dtype=torch.float16)
    assert "neither" in rescale.unsuited(draw(3), half, half, -1)
    assert "float64" in rescale.unsuited(*(draw(3, dtype=torch.float64) for _ in range(3)), -1)


def test_the_operations_are_registered_as_torch_asks(draw):
    for shape, channel in (((4, 5), -1), ((2, 5, 3, 2), -3)):
        u, gain, offset = draw(*shape).requires_grad_(), draw(5).requires_grad_(), draw(5).requires_grad_()
        torch.library.opcheck(torch.ops.nerine.rescale, (u, gain, offset, channel))
    last = draw(2, 3, 2, 5).permute(0, 3, 1, 2)
    torch.library.opcheck(torch.ops.nerine.rescale_grad, (last, last, draw(5), -3, True), test_utils="test_faketensor")
