"""Arithmetic on low-rank products against the products themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nerine.ops.factored import (
    Spectrum,
    balanced,
    dense_spectrum,
    halves,
    kron_factors,
    kron_spectrum,
    least_rank,
    loss,
    spectrum,
    split_matrix,
    stacked,
)
from nerine.ops.kron import kron

SIZES = st.integers(1, 9)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(found: Spectrum) -> Tensor:
    return (found.u * found.s) @ found.vh


@given(out=SIZES, inputs=SIZES, rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_spectrum_of_a_product_is_that_of_its_matrix(out: int, inputs: int, rank: int, seed: int) -> None:
    """More ranks than the smaller side included."""
    up, down = drawn(seed, out, rank), drawn(seed + 1, rank, inputs)
    found = spectrum(up, down)
    count = min(out, inputs, rank)
    assert len(found.s) == count
    torch.testing.assert_close(found.s, torch.linalg.svdvals(up @ down)[:count], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(built(found), up @ down, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.u.mT @ found.u, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-9)


@given(a=SIZES, b=SIZES, c=SIZES, d=SIZES, taps=st.sampled_from([(), (3,), (2, 3)]), seed=st.integers(0, 99))
def test_kronecker_products(a: int, b: int, c: int, d: int, taps: tuple[int, ...], seed: int) -> None:
    w1, w2 = drawn(seed, a, c), drawn(seed + 1, b, d, *taps)
    dense = kron(w1, w2).flatten(1)
    whole = kron_spectrum(dense_spectrum(w1), dense_spectrum(w2.flatten(1)), d)
    torch.testing.assert_close(built(whole), dense, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whole.s, torch.linalg.svdvals(dense)[: len(whole.s)], rtol=1e-9, atol=1e-9)
    first = kron_spectrum(dense_spectrum(w1), dense_spectrum(w2.flatten(1)), d, 2)
    torch.testing.assert_close(first.s, whole.s[:2])
    torch.testing.assert_close(built(first), (whole.u[:, :2] * whole.s[:2]) @ whole.vh[:2])
    up, down = kron_factors(split_matrix(w1), split_matrix(w2.flatten(1)), d)
    assert up.shape[1] == min(a, c) * min(b, w2.flatten(1).shape[1])
    assert torch.equal(up @ down, dense) or float((up @ down - dense).abs().max()) < 1e-12


@pytest.mark.parametrize(("out", "inputs", "rank"), [(7, 5, 5), (5, 7, 5), (9, 8, 3), (4, 4, 1)])
def test_a_matrix_is_split_by_its_numerical_rank(out: int, inputs: int, rank: int) -> None:
    matrix = (drawn(1, out, rank) @ drawn(2, rank, inputs)).float()
    up, down = split_matrix(matrix)
    assert up.shape == (out, rank)
    torch.testing.assert_close(up @ down, matrix, rtol=0, atol=2e-6)
    assert split_matrix(torch.zeros(3, 4))[0].shape == (3, 1)


@given(
    values=st.lists(st.floats(0.01, 100), min_size=1, max_size=8),
    error=st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9]),
)
def test_the_least_rank_within_an_error(values: list[float], error: float) -> None:
    s = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    rank = least_rank(s, error)
    assert loss(s, rank) <= error + 1e-9
    assert rank == 1 or loss(s, rank - 1) > error


def test_small_changes_are_not_nothing() -> None:
    """Squares of 1e-25 are zero in fp32."""
    s = torch.tensor([3e-25, 4e-26])
    assert loss(s, 1) == pytest.approx(4 / (30**2 + 4**2) ** 0.5)
    assert least_rank(s, 0.05) == 2
    assert loss(torch.zeros(3), 1) == 0.0
    assert least_rank(torch.zeros(3), 0.1) == 1


def test_halves_share_the_values_out_and_fill_up_with_nothing() -> None:
    found = spectrum(drawn(3, 6, 4), drawn(4, 4, 9))
    up, down = halves(found, 3)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))
    torch.testing.assert_close(up @ down, (found.u[:, :3] * found.s[:3]) @ found.vh[:3])
    up, down = halves(found, 6)
    assert (up.shape, down.shape) == ((6, 6), (6, 9))
    torch.testing.assert_close(up @ down, built(found))
    assert not up[:, 4:].any()


@given(seed=st.integers(0, 99), big=st.integers(-12, 12))
def test_balanced_factors_have_the_same_product_to_the_bit(seed: int, big: int) -> None:
    up, down = drawn(seed, 5, 3).float() * 10.0**big, drawn(seed + 1, 3, 4).float()
    found = balanced(up, down)
    for rank in range(3):
        assert torch.equal(found[0][:, rank, None] * found[1][rank], up[:, rank, None] * down[rank])
    ratio = found[0].norm(dim=0) / found[1].norm(dim=1)
    assert float(ratio.max()) < 2.1
    assert float(ratio.min()) > 0.48
    silent = balanced(torch.zeros(2, 1), torch.ones(1, 2))
    assert torch.equal(silent[1], torch.ones(1, 2))


def test_sums_stand_side_by_side() -> None:
    terms = [(drawn(i, 6, 2 + i), drawn(9 + i, 2 + i, 5)) for i in range(3)]
    up, down = stacked(terms)
    assert up.shape == (6, 9)
    torch.testing.assert_close(
        up @ down, terms[0][0] @ terms[0][1] + terms[1][0] @ terms[1][1] + terms[2][0] @ terms[2][1]
    )
