"""Kronecker products: how sizes are split, and the dense product against torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nerine.ops.kron import factorize, kron, kron_row_square, mix_channels

# what LyCORIS 4.1.3 gives: (size, factor) -> (small, large)
KNOWN = {
    (127, -1): (1, 127),
    (128, -1): (8, 16),
    (250, -1): (10, 25),
    (320, -1): (16, 20),
    (320, 4): (4, 80),
    (320, 8): (8, 40),
    (360, -1): (18, 20),
    (360, 16): (15, 24),
    (512, -1): (16, 32),
    (640, 8): (8, 80),
    (768, 16): (16, 48),
    (1024, -1): (32, 32),
    (1280, -1): (32, 40),
    (3072, -1): (48, 64),
    (3072, 16): (16, 192),
    (64, 128): (8, 8),
    (7, 4): (1, 7),
    (12, 5): (3, 4),
}


@pytest.mark.parametrize(("asked", "found"), KNOWN.items(), ids=str)
def test_factorize_as_files_have_it(asked: tuple[int, int], found: tuple[int, int]) -> None:
    assert factorize(*asked) == found


def by_stepping(size: int, factor: int) -> tuple[int, int]:
    """The rule as formats are documented: climb from divisor to divisor until the sum stops to shrink."""
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    bound = size if factor < 0 else factor
    small, large, start = 1, size, 1 + size
    while small < large:
        step = small + 1
        while size % step:
            step += 1
        other = size // step
        if step + other > start or step > bound:
            break
        small, large = step, other
    return min(small, large), max(small, large)


@given(st.integers(1, 5000), st.one_of(st.just(-1), st.integers(1, 200)))
def test_factorize_is_the_documented_rule(size: int, factor: int) -> None:
    small, large = factorize(size, factor)
    assert small * large == size
    assert small <= large
    assert (small, large) == by_stepping(size, factor)


@given(st.lists(st.integers(1, 4), min_size=4, max_size=4), st.lists(st.integers(1, 3), max_size=3))
def test_dense_product(sizes: list[int], kernel: list[int]) -> None:
    a, b, c, d = sizes
    w1, w2 = torch.randn(a, c, dtype=torch.float64), torch.randn(b, d, *kernel, dtype=torch.float64)
    want = torch.kron(w1.reshape(a, c, *[1] * len(kernel)), w2)
    assert torch.equal(kron(w1, w2), want)
    weight = torch.randn_like(want)
    torch.testing.assert_close(kron_row_square(weight, w1, w2), (weight + want).flatten(1).square().sum(1))


@given(st.lists(st.integers(1, 4), min_size=3, max_size=3), st.integers(0, 2), st.lists(st.integers(1, 3), max_size=2))
def test_mixing_channels(sizes: list[int], spatial: int, batch: list[int]) -> None:
    a, c, d = sizes
    w1 = torch.randn(a, c, dtype=torch.float64)
    x = torch.randn(*batch, c * d, *[3] * spatial, dtype=torch.float64)
    got = mix_channels(x, w1, -1 - spatial)
    split = x.unflatten(-1 - spatial, (c, d)).movedim(-2 - spatial, -1)
    torch.testing.assert_close(got.movedim(-2 - spatial, -1), split @ w1.mT)
