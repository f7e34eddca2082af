"""Leading singular triplets from a few products with thin matrices, against the whole decomposition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nerine.errors import OptionError
from nerine.ops import krylov
from nerine.ops.low_rank_fit import Leading, above, above_share, leading, leading_until, spectrum, within


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(out: int, inputs: int, values: Tensor, seed: int = 0) -> Tensor:
    """A matrix with these singular values, in fp64."""
    rng, k = seeded(seed), len(values)
    u, _ = torch.linalg.qr(torch.randn(out, k, dtype=torch.float64, generator=rng))
    v, _ = torch.linalg.qr(torch.randn(inputs, k, dtype=torch.float64, generator=rng))
    return (u * values) @ v.mT


def powers(count: int, exponent: float) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64) ** -exponent


def check(found: Leading, matrix: Tensor, rank: int, tolerance: float) -> None:
    """Orthonormal, sorted, honest about what is left, and within `tolerance` of the best."""
    eps = torch.finfo(matrix.dtype).eps
    u, s, vh, wide = found.u.double(), found.s.double(), found.vh.double(), matrix.double()
    values = torch.linalg.svdvals(wide)
    rank = min(rank, *matrix.shape)
    assert found.u.dtype == matrix.dtype
    assert (found.rank, *u.shape, *vh.shape) == (rank, matrix.shape[0], rank, rank, matrix.shape[1])
    assert (s.diff() <= 0).all()
    for gram in (u.mT @ u, vh @ vh.mT):
        assert (gram - torch.eye(rank, dtype=torch.float64)).abs().max() < 100 * eps
    left, best = float((wide - (u * s) @ vh).norm()), float(values[rank:].square().sum().sqrt())
    dust = 100 * eps * float(wide.norm())
    assert found.total == pytest.approx(float(wide.norm()), rel=1e-12)
    assert left <= (1 + tolerance) * best + dust
    assert found.rest == pytest.approx(left, rel=1e-3, abs=dust / 4)
    assert best > dust or found.rest <= dust


SPECTRA = {
    "usual": powers(96, 0.7),
    "flat": powers(96, 0.3),
    "steep": powers(96, 2.0),
    "close": 1 / (1 + 0.01 * torch.arange(96, dtype=torch.float64)),
    "step": torch.where(torch.arange(96) < 14, 1.0, 0.01).double(),
    "all alike": torch.ones(96, dtype=torch.float64),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(96, 250), (250, 96), (96, 96)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [1, 12, 60])
def test_leading(name: str, shape: tuple[int, int], dtype: torch.dtype, rank: int) -> None:
    matrix = made(*shape, SPECTRA[name]).to(dtype)
    check(leading(matrix, rank), matrix, rank, 1e-3)


def test_the_iteration_is_taken_where_it_pays() -> None:
    matrix = made(200, 250, powers(200, 0.7))
    found, whole = leading(matrix, 12), leading(matrix, 60)
    assert not found.exact
    assert 0 < found.excess <= 1e-3
    assert whole.exact
    assert whole.excess == 0


def test_the_estimate_of_the_excess_is_no_flattery() -> None:
    """Over many spectra, it is hardly ever less than the true excess."""
    short = 0
    cases = [(values, seed, rank) for values in SPECTRA.values() for seed in range(4) for rank in (1, 3, 12)]
    for values, seed, rank in cases:
        matrix = made(160, 200, values, seed)
        found = leading(matrix, rank, tolerance=1e-2)
        best = float(values[rank:].square().sum().sqrt())
        excess = float((matrix - (found.u * found.s) @ found.vh).norm()) / best - 1
        assert excess <= 1e-2
        short += excess > found.excess + 1e-9
    assert short <= len(cases) // 20


@pytest.mark.parametrize("shape", [(320, 900), (900, 320)], ids=str)
def test_a_large_matrix_of_noise(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=seeded(1))
    for rank in (4, 16):
        found = leading(matrix, rank)
        check(found, matrix, rank, 1e-3)
        assert not found.exact
    check(leading(matrix, 300), matrix, 300, 1e-6)  # by the Gram matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [5, 9, 40])
def test_what_has_a_small_rank_is_found_to_the_last_digit(dtype: torch.dtype, rank: int) -> None:
    matrix = made(240, 300, powers(5, 1.0)).to(dtype)
    found = leading(matrix, rank)
    check(found, matrix, rank, 1e-3)
    assert found.rest <= 16 * torch.finfo(dtype).eps * found.total  # 3.6e-15 in fp64
    assert found.exact
    assert found.excess == 0


@pytest.mark.parametrize("size", [6, 240])
def test_a_matrix_of_zeros(size: int) -> None:
    matrix = torch.zeros(size, 300)
    found = leading(matrix, 4)
    assert (found.total, found.rest, found.excess, found.exact) == (0, 0, 0, True)
    assert torch.equal(found.s, torch.zeros(4))
    torch.testing.assert_close(found.u.mT @ found.u, torch.eye(4))


def test_rows_that_are_zero_or_alone() -> None:
    """Nothing is missed where nearly everything is zero, nor where a thin product could not tell the entries apart."""
    matrix = torch.zeros(200, 300, dtype=torch.float64)
    matrix[17, 205], matrix[150, 3], matrix[3, 3] = 3.0, 2.0, 1e-3
    check(leading(matrix, 1), matrix, 1, 1e-3)
    check(leading(matrix, 2), matrix, 2, 1e-3)
    matrix = torch.eye(200, 300, dtype=torch.float64)
    check(leading(matrix, 6), matrix, 6, 1e-3)


def test_a_direction_that_the_sketch_is_blind_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The remainder is looked at once more before the answer is given."""
    matrix = made(120, 160, powers(120, 0.2))
    matrix[:, 0] = 0
    matrix[0] = 0
    matrix[0, 0] = 5.0  # the largest singular value, and alone
    sketch = krylov.sketch

    def blind(like: Tensor, rows: int, columns: int, salt: int) -> Tensor:
        made = sketch(like, rows, columns, salt)
        made[: -krylov.PROBES, 0] = 0
        return made

    monkeypatch.setattr(krylov, "sketch", blind)
    check(leading(matrix, 3), matrix, 3, 1e-3)
    monkeypatch.setattr(krylov.Space, "missed", lambda *_: None)
    assert float(leading(matrix, 3).s[0]) < 2  # it was no help that found it


def test_the_same_answer_every_time() -> None:
    matrix = made(96, 250, SPECTRA["usual"]).float()
    state = torch.random.get_rng_state()
    one, two = leading(matrix, 12), leading(matrix.clone(), 12)
    assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3], strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_sketch_looks_like_chance() -> None:
    made = krylov.sketch(torch.zeros(1, dtype=torch.float64), 400, 50, 1)
    assert float(made.abs().max()) <= 1
    assert float(made.mean()) == pytest.approx(0, abs=4 / math.sqrt(3 * made.numel()))
    assert float(made.square().mean()) == pytest.approx(1 / 3, abs=0.01)
    values = torch.linalg.svdvals(made) / math.sqrt(400 / 3)  # of a random matrix: 1 ± √(50/400)
    assert float(values.max()) < 1.45
    assert float(values.min()) > 0.55
    other = krylov.sketch(made, 400, 50, 2)
    assert float((made * other).mean()) == pytest.approx(0, abs=4 / 3 / math.sqrt(made.numel()))


def test_half_precision_is_widened() -> None:
    matrix = made(96, 250, SPECTRA["usual"]).bfloat16()
    found = leading(matrix, 8)
    assert found.u.dtype == torch.float32
    check(found, matrix.float(), 8, 1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(value: float) -> None:
    matrix = torch.ones(70, 80)
    matrix[3, 4] = value
    for ask in (lambda: leading(matrix, 2), lambda: spectrum(matrix)):
        with pytest.raises(OptionError, match="no numbers"):
            ask()


def test_nonsense_is_refused() -> None:
    with pytest.raises(OptionError, match="rank must be at least 1, got 0"):
        leading(torch.ones(3, 4), 0)
    with pytest.raises(OptionError, match="flatten the kernel first"):
        leading(torch.ones(3, 4, 1, 1), 1)


@pytest.mark.parametrize("shape", [(150, 400), (400, 150), (20, 30)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_spectrum(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for values in (powers(min(shape), 0.7), powers(min(shape), 4.0), powers(5, 0.5)):
        matrix = made(*shape, values).to(dtype)
        found, want = spectrum(matrix), torch.linalg.svdvals(matrix.double())
        assert found.dtype == dtype
        assert found.shape == (min(shape),)
        assert (found.double() - want).abs().max() <= 20 * torch.finfo(dtype).eps * float(want[0])


# -- the rank that is enough ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("error", [0.9, 0.5, 0.3, 0.1, 1e-3])
def test_within_an_error(error: float) -> None:
    values = powers(96, 0.9)
    matrix = made(96, 250, values)
    left = torch.cat([values.square().flip(0).cumsum(0).flip(0), torch.zeros(1)]).sqrt()
    least = int((left <= error * left[0]).nonzero()[0])
    found = leading_until(matrix, within(error), first=2)
    assert least <= found.rank <= least + 1  # one more where the last is close and not quite found
    assert found.rest <= error * found.total
    assert found.rest == pytest.approx(float((matrix - (found.u * found.s) @ found.vh).norm()), rel=1e-6)


def test_an_error_far_below_rounding_of_the_sum() -> None:
    """1e-7 of the size is 1e-14 of the squares, which fp32 sums would never show."""
    values = torch.cat([torch.ones(3), torch.full((5,), 1e-4), torch.full((40,), 1e-9)]).double()
    matrix = made(150, 180, values).float()
    assert leading_until(matrix, within(1e-2), first=4).rank == 3
    assert leading_until(matrix, within(1e-5), first=4).rank == 8


def test_above_a_value_or_a_share() -> None:
    values = powers(96, 0.7) * 4
    matrix = made(96, 250, values)
    for value in (3.0, 1.0, 0.5, 0.3):
        want = int((values > value).sum())
        assert leading_until(matrix, above(value), first=2).rank == want
        assert leading_until(matrix, above_share(value / 4), first=2).rank == want
    assert leading_until(matrix, above(0.0), first=2).rank == 96
    assert leading_until(matrix, above(5.0), first=2).rank == 0


def test_a_cut_keeps_the_account() -> None:
    matrix = made(96, 250, SPECTRA["usual"])
    whole = leading(matrix, 12)
    for rank in (0, 3, 11, 12):
        cut = whole.cut(rank)
        left = float((matrix - (cut.u * cut.s) @ cut.vh).norm())
        assert cut.rank == rank
        assert cut.rest == pytest.approx(left, rel=1e-9)
        assert float(whole.rests[rank]) == pytest.approx(left, rel=1e-9)
        assert cut.excess <= whole.excess
    up, down = whole.halves()
    torch.testing.assert_close(up @ down, (whole.u * whole.s) @ whole.vh)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))
    more_up, more_down = whole.halves(15)
    assert (more_up.shape, more_down.shape) == ((96, 15), (15, 250))
    assert torch.equal(more_up @ more_down, up @ down)
