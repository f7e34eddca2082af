"""The nearest Kronecker product, with full factors and with factors of low rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nerine.ops.kron import kron, kron_rows, nearest_kron
from nerine.ops.kron_fit import Halves, Ranks, low_rank_kron


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def whole(halves: Halves) -> Tensor:
    return halves[0] if len(halves) == 1 else halves[0] @ halves[1]


def error_of(matrix: Tensor, shape: tuple[int, int], ranks: Ranks) -> float:
    first, second = (whole(h) for h in low_rank_kron(matrix, shape, ranks))
    w2 = second.reshape(len(second), matrix.shape[1] // shape[1], *matrix.shape[2:])
    return float((matrix - kron(first, w2)).norm())


def cut_once(matrix: Tensor, shape: tuple[int, int], ranks: Ranks) -> float:
    """The error of the nearest product with each factor cut down by itself."""
    u, s, vh = torch.linalg.svd(kron_rows(matrix, shape), full_matrices=False)
    factors = []
    for vector, rows, rank in ((u[:, 0] * s[0], shape[0], ranks[0]), (vh[0], matrix.shape[0] // shape[0], ranks[1])):
        a, b, c = torch.linalg.svd(vector.reshape(rows, -1), full_matrices=False)
        factors.append((a[:, :rank] * b[:rank]) @ c[:rank])
    w2 = factors[1].reshape(len(factors[1]), matrix.shape[1] // shape[1], *matrix.shape[2:])
    return float((matrix - kron(factors[0], w2)).norm())


def test_the_nearest_product() -> None:
    matrix = normal(12, 20, 3)
    w1, w2 = nearest_kron(matrix, (3, 4), (3,))
    best = torch.linalg.svdvals(kron_rows(matrix, (3, 4)))[1:].square().sum().sqrt()
    assert (w1.shape, w2.shape) == ((3, 4), (4, 5, 3))
    assert float((matrix - kron(w1, w2)).norm()) == pytest.approx(float(best), rel=1e-9)
    assert error_of(matrix, (3, 4), (None, None)) == pytest.approx(float(best), rel=1e-9)


@pytest.mark.parametrize("ranks", [(None, 2), (1, 2), (2, None), (2, 7)], ids=str)
@pytest.mark.parametrize("tail", [(), (3, 3)], ids=str)
def test_taking_turns_is_never_worse_than_cutting_once(ranks: Ranks, tail: tuple[int, ...]) -> None:
    gains = []
    for seed in range(8):
        matrix = normal(24, 35, *tail, seed=seed)
        new, old = error_of(matrix, (4, 5), ranks), cut_once(matrix, (4, 5), ranks)
        assert new <= old * (1 + 1e-9)
        gains.append(1 - new / old)
    assert sum(gains) > 0.01


@pytest.mark.parametrize("ranks", [(None, 2), (1, 2), (2, None), (3, 6)], ids=str)
def test_a_product_of_such_factors_is_found_again(ranks: Ranks) -> None:
    first = normal(5, 4, seed=1) if ranks[0] is None else normal(5, ranks[0], seed=1) @ normal(ranks[0], 4, seed=2)
    second = normal(8, 18, seed=3) if ranks[1] is None else normal(8, ranks[1], seed=3) @ normal(ranks[1], 18, seed=4)
    matrix = kron(first, second.reshape(8, 6, 3))
    found = low_rank_kron(matrix, (5, 4), ranks)
    assert error_of(matrix, (5, 4), ranks) <= 1e-9 * float(matrix.norm())
    for halves, rank in zip(found, ranks, strict=True):
        assert len(halves) == (1 if rank is None else 2)
        assert rank is None or (halves[0].shape[1], halves[1].shape[0]) == (rank, rank)


def test_no_change_at_all() -> None:
    for ranks in ((None, None), (1, 2)):
        found = low_rank_kron(torch.zeros(12, 20), (3, 4), ranks)
        assert all(torch.equal(t, torch.zeros_like(t)) for t in [whole(found[0]), whole(found[1])])
