"""Fits of every algorithm: never worse than the plain rule they refine, bounded where asked, sound in odd cases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nerine.algorithms import (
    IA3,
    Algorithm,
    DiagOFT,
    DoRA,
    DyLoRA,
    Full,
    GLoRA,
    LoHa,
    LoKr,
    LoRA,
    Params,
)
from nerine.ops.cayley import skew
from nerine.site import Site

LINEAR = Site("linear", (24, 36), has_bias=True)
TALL = Site("linear", (60, 15))
CONV = Site("conv", (20, 12, 3, 3), (1, 1), (0, 0), (1, 1), 1)
GROUPED = Site("conv", (20, 6, 3, 3), (1, 1), (0, 0), (1, 1), 2)
SITES = (LINEAR, TALL, CONV, GROUPED)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(site: Site, seed: int = 0, size: float = 0.3) -> tuple[Tensor, Tensor]:
    """A weight and what it is to become: a change whose singular values fall off, as those of training do."""
    weight, change = normal(*site.shape, seed=seed), normal(*site.shape, seed=seed + 1).flatten(1)
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    falling = s * torch.arange(1, len(s) + 1, dtype=torch.float64) ** -0.7
    return weight, weight + size * ((u * falling) @ vh).reshape(site.shape)


def error_of(algorithm: Algorithm, site: Site, weight: Tensor, target: Tensor) -> float:
    found = algorithm.fit(site, weight, target)
    return float((algorithm.weight(found, weight) - target).norm())


def best_of_rank(change: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(change.flatten(1))[rank:].square().sum().sqrt())


SOME: tuple[Algorithm, ...] = (
    LoRA(rank=4, alpha=3.0),
    DyLoRA(rank=3, alpha=2.0),
    LoHa(rank=3, alpha=2.0),
    LoKr(rank=2, alpha=3.0, factor=4),
    LoKr(rank=1, alpha=3.0, factor=4, decompose_both=True),
    LoKr(full_matrix=True),
    GLoRA(rank=3, alpha=2.0),
    Full(bias=False),
    IA3(),
    IA3(on_input=True),
    DiagOFT(block_size=4),
    DiagOFT(block_size=4, rescale=True, constraint=0.02),
    DoRA(LoRA(rank=3, alpha=2.0)),
    DoRA(LoKr(rank=2, factor=4), axis="in"),
)


# -- low rank --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("make", [LoRA, DyLoRA])
def test_a_lora_is_the_best_of_its_rank(make: Callable[..., Algorithm], site: Site) -> None:
    weight, target = pair(site)
    assert error_of(make(rank=4, alpha=3.0), site, weight, target) == pytest.approx(best_of_rank(target - weight, 4))


def test_a_large_lora_is_nearly_the_best_of_its_rank() -> None:
    """Here only the leading directions are computed."""
    site = Site("linear", (300, 450))
    weight, target = pair(site)
    best = best_of_rank(target - weight, 8)
    found = error_of(LoRA(rank=8, alpha=5.0), site, weight, target)
    assert best < found <= 1.001 * best


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_loha_is_never_worse_than_a_lora_of_its_rank(site: Site, rank: int) -> None:
    weight, target = pair(site)
    found = error_of(LoHa(rank=rank, alpha=0.7), site, weight, target)
    best = best_of_rank(target - weight, rank)
    assert found <= best * (1 + 1e-9)
    assert rank == 1 or found < 0.99 * best  # of rank 1 the two are the same set


def test_a_loha_of_noise_is_better_than_a_lora_of_as_many_numbers() -> None:
    """With ranks that are no small part of the layer; on large layers the LoRA wins."""
    weight, change = normal(60, 90), normal(60, 90, seed=1)
    found = error_of(LoHa(rank=8), Site("linear", (60, 90)), weight, weight + change)
    assert found < best_of_rank(change, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_loha_of_rank_one_or_two_is_found_again(dtype: torch.dtype) -> None:
    site = Site("linear", (50, 70))
    weight = normal(50, 70).to(dtype)
    for rank in (1, 2):
        for seed in range(6):
            a, b, c, d = (normal(*s, seed=10 * seed + i) for i, s in enumerate([(50, rank), (rank, 70)] * 2))
            change = ((a @ b) * (c @ d)).to(dtype)
            found = LoHa(rank=rank, alpha=1.5).fit(site, torch.zeros_like(weight), change)
            left = LoHa(rank=rank).weight(found, torch.zeros_like(weight)) - change
            assert float(left.norm() / change.norm()) < (1e-6 if rank == 1 else 1e-2)


@pytest.mark.parametrize("site", SITES, ids=str)
def test_a_glora_is_never_worse_than_a_lora_of_its_rank(site: Site) -> None:
    weight, target = pair(site)
    found = error_of(GLoRA(rank=3, alpha=2.0), site, weight, target)
    best, twice = (best_of_rank(target - weight, rank) for rank in (3, 6))
    assert found < 0.99 * best
    if site is LINEAR:  # the weight has full row rank: both parts together reach whatever has twice the rank
        assert found == pytest.approx(twice, rel=1e-3)


@pytest.mark.parametrize("site", [LINEAR, TALL, CONV], ids=str)
def test_a_glora_does_not_blow_up_where_the_weight_is_weak(site: Site) -> None:
    weight, target = pair(site)
    u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    s[len(s) // 2 :] *= 1e-9
    weak = ((u * s) @ vh).reshape(site.shape)
    change = target - weight
    found = GLoRA(rank=3, alpha=2.0).fit(site, weak, weak + change)
    inner = found.tensors["a1"].flatten(1) @ found.tensors["a2"].flatten(1)
    assert float(inner.norm()) * float(s[0]) < 2e3 * float(change.norm())
    left = GLoRA(rank=3).weight_deviation(found, weak) - change
    assert float(left.norm()) <= best_of_rank(change, 3) * (1 + 1e-9)


def test_a_glora_beside_nothing_is_a_lora() -> None:
    change = normal(*LINEAR.shape)
    found = GLoRA(rank=3).fit(LINEAR, torch.zeros_like(change), change)
    left = GLoRA(rank=3).weight_deviation(found, torch.zeros_like(change)) - change
    assert float(left.norm()) == pytest.approx(best_of_rank(change, 3))


# -- rotations and factors ---------------------------------------------------------------------------------------------
def test_factors_of_a_rotation_are_found_with_it() -> None:
    for site in (LINEAR, CONV):
        weight = normal(*site.shape)
        blocks = 0.2 * normal(site.shape[0] // 4, 4, 4, seed=1)
        gain = 1 + 0.3 * normal(site.shape[0], seed=2).clamp(-2, 2)
        algorithm = DiagOFT(block_size=4, rescale=True)
        made = Params({"blocks": blocks, "rescale": gain.reshape(-1, *[1] * (weight.dim() - 1))}, 0.0)
        target = algorithm.weight(made, weight)
        found = algorithm.fit(site, weight, target)
        torch.testing.assert_close(found.tensors["rescale"].reshape(-1), gain, rtol=1e-4, atol=1e-4)
        assert float((algorithm.weight(found, weight) - target).norm()) < 1e-4 * float((target - weight).norm())


@pytest.mark.parametrize("constraint", [0.0, 0.01])
def test_factors_never_make_a_rotation_worse(constraint: float) -> None:
    for seed in range(4):
        weight, target = pair(LINEAR, seed)
        with_factors = error_of(DiagOFT(block_size=6, rescale=True, constraint=constraint), LINEAR, weight, target)
        assert with_factors < error_of(DiagOFT(block_size=6, constraint=constraint), LINEAR, weight, target)


def test_a_bounded_rotation_keeps_its_bound() -> None:
    weight, target = pair(LINEAR)
    free = DiagOFT(block_size=6).fit(LINEAR, weight, target)
    limit = 0.25 * float(skew(free.tensors["blocks"]).norm())
    for rescale in (False, True):
        algorithm = DiagOFT(block_size=6, rescale=rescale, constraint=limit / LINEAR.shape[0])
        found = algorithm.fit(LINEAR, weight, target)
        assert float(skew(found.tensors["blocks"]).norm()) == pytest.approx(limit)
        assert float((algorithm.weight(found, weight) - target).norm()) < float((target - weight).norm())


def test_half_turns_and_reflections_do_no_harm() -> None:
    weight = normal(*LINEAR.shape)
    mirrored = weight.clone()
    mirrored[0] *= -1
    for target in (-weight, mirrored, torch.zeros_like(weight)):
        for rescale in (False, True):
            algorithm = DiagOFT(block_size=4, rescale=rescale)
            found = algorithm.fit(LINEAR, weight, target)
            assert all(bool(torch.isfinite(t).all()) for t in found.tensors.values())
            left = float((algorithm.weight(found, weight) - target).norm())
            assert left <= float((weight - target).norm()) * (1 + 1e-9)


@pytest.mark.parametrize("on_input", [False, True])
def test_rows_of_zeros_are_not_scaled(on_input: bool) -> None:
    weight, target = pair(CONV)
    weight[3], weight[:, 5] = 0, 0
    found = IA3(on_input=on_input).fit(CONV, weight, target)
    (w,) = (t.reshape(-1) for t in found.tensors.values())
    assert float(w[5 if on_input else 3]) == 0
    small = IA3(on_input=on_input).fit(CONV, weight * 1e-20, target * 1e-20)
    torch.testing.assert_close(next(iter(small.tensors.values())).reshape(-1), w)


# -- directions and lengths ------------------------------------------------------------------------------------------
def former_error(algorithm: DoRA, site: Site, weight: Tensor, target: Tensor) -> float:
    """Of the plain rule: the inner adapter fitted to the target as it is, and its lengths for the magnitudes."""
    norm = target.flatten(1).norm(dim=1) if algorithm.axis == "out" else target.transpose(0, 1).flatten(1).norm(dim=1)
    shape = algorithm.design(site).shapes["magnitude"]
    inner = algorithm.inner.fit(site, weight, target)
    found = Params({"magnitude": norm.reshape(shape), **inner.tensors}, inner.scale)
    return float((algorithm.weight(found, weight) - target).norm())


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("inner", [LoRA(rank=3, alpha=2.0), LoKr(rank=1, factor=3), IA3(on_input=True)], ids=str)
def test_a_dora_is_better_than_its_plain_rule(inner: Algorithm, axis: str, site: Site) -> None:
    algorithm = DoRA(inner, axis=axis)
    for seed in range(3):
        weight, target = pair(site, seed)
        if axis == "out":
            target = target * (1 + 0.2 * normal(site.shape[0], seed=9)).reshape(-1, *[1] * (target.dim() - 1))
        assert error_of(algorithm, site, weight, target) < former_error(algorithm, site, weight, target)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_changed_lengths_alone_need_no_inner_change(axis: str) -> None:
    """It is all magnitude: from turn to turn less of it is left to the inner adapter."""
    weight = normal(*LINEAR.shape)
    factors = 1 + 0.2 * normal(LINEAR.shape[axis == "in"], seed=3)
    target = weight * (factors[:, None] if axis == "out" else factors)
    algorithm = DoRA(LoRA(rank=1), axis=axis)
    assert error_of(algorithm, LINEAR, weight, target) < 0.4 * former_error(algorithm, LINEAR, weight, target)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_rows_of_zeros_have_no_direction(axis: str) -> None:
    for which in (0, 1):
        weight, target = both = pair(LINEAR)
        both[which][3], both[which][:, 5] = 0, 0
        algorithm = DoRA(LoRA(rank=3, alpha=2.0), axis=axis)
        found = algorithm.fit(LINEAR, weight, target)
        assert all(bool(torch.isfinite(t).all()) for t in found.tensors.values())
        assert (found.tensors["magnitude"] != 0).all()
        left = float((algorithm.weight(found, weight) - target).norm())
        assert left < float((weight - target).norm())


# -- all of them -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", SOME, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_number_formats(algorithm: Algorithm, dtype: torch.dtype) -> None:
    """fp64 stays, the rest is fp32; the result depends on nothing but the input, and autocast changes nothing."""
    for site in (LINEAR, CONV):
        weight, target = (t.to(dtype) for t in pair(site))
        state = torch.random.get_rng_state()
        found = algorithm.fit(site, weight, target)
        with torch.autocast("cpu", torch.bfloat16):
            again = algorithm.fit(site, weight.clone(), target.clone())
        assert torch.equal(torch.random.get_rng_state(), state)
        for name, tensor in found.tensors.items():
            assert tensor.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert not tensor.requires_grad
            assert torch.equal(tensor, again.tensors[name]), name
        shapes = algorithm.design(site).shapes
        assert {name: tuple(t.shape) for name, t in found.tensors.items()} == shapes
        wide = weight if dtype == torch.float64 else weight.float()
        left = float((algorithm.weight(found, wide) - target).norm() / (target - weight).norm())
        assert left < (1e-9 if dtype == torch.float64 else 1e-3) if isinstance(algorithm, Full) else left < 1


@pytest.mark.parametrize("algorithm", SOME, ids=str)
def test_fp32_fits_are_those_of_fp64(algorithm: Algorithm) -> None:
    for site in (LINEAR, CONV):
        weight, target = pair(site)
        exact = error_of(algorithm, site, weight, target)
        rough = error_of(algorithm, site, weight.float(), target.float())
        assert rough == pytest.approx(exact, rel=2e-2, abs=1e-5)


@pytest.mark.parametrize("algorithm", SOME, ids=str)
def test_no_change_is_fitted_by_no_change(algorithm: Algorithm) -> None:
    for site in (LINEAR, CONV):
        weight, _ = pair(site)
        found = algorithm.fit(site, weight, weight)
        assert all(bool(torch.isfinite(t).all()) for t in found.tensors.values())
        assert float((algorithm.weight(found, weight) - weight).norm()) <= 1e-9 * float(weight.norm())


@pytest.mark.parametrize("algorithm", SOME, ids=str)
def test_a_parameter_is_as_good_as_a_tensor(algorithm: Algorithm) -> None:
    weight, target = pair(LINEAR)
    found = algorithm.fit(LINEAR, torch.nn.Parameter(weight), torch.nn.Parameter(target))
    assert not any(t.requires_grad for t in found.tensors.values())


@pytest.mark.parametrize("algorithm", SOME, ids=str)
def test_a_rank_larger_than_the_layer(algorithm: Algorithm) -> None:
    inner: Algorithm = getattr(algorithm, "inner", algorithm)
    if not hasattr(inner, "rank") or isinstance(inner, LoKr):
        return
    site = Site("linear", (5, 7))
    weight, target = pair(site)
    large = type(inner)(rank=9, alpha=4.0)  # type: ignore[call-arg]
    assert error_of(large, site, weight, target) <= 1e-9
