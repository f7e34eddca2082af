"""Draws that depend on the seed, the purpose and the place, and on nothing else."""

from __future__ import annotations

import torch

from nerine.train.randomness import Dice


def test_the_same_place_gives_the_same_draw_in_any_order() -> None:
    one, two = Dice(3), Dice(3)
    first = [one.normal((2, 3), "noise", n) for n in range(4)]
    second = [two.normal((2, 3), "noise", n) for n in reversed(range(4))]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(second), strict=True))


def test_seed_purpose_and_place_all_count() -> None:
    found = {
        Dice(0).number("a", 1),
        Dice(1).number("a", 1),
        Dice(0).number("b", 1),
        Dice(0).number("a", 2),
        Dice(0).number("a", 1, 0),
        Dice(0).number("a/1"),
    }
    assert len(found) >= 5  # the last may be read as the first: purposes have no slashes


def test_torchs_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    Dice(0).normal((4,), "x")
    Dice(0).order(9, "x")
    assert torch.equal(torch.get_rng_state(), before)


def test_chances_are_uniform() -> None:
    found = torch.tensor([Dice(5).chance("flip", n) for n in range(4000)], dtype=torch.float64)
    assert 0 <= found.min() < 0.01
    assert 0.99 < found.max() < 1
    assert abs(found.mean() - 0.5) < 0.015  # three standard errors are 0.0137
    assert abs(found.std() - 12**-0.5) < 0.01


def test_an_order_has_everyone_once() -> None:
    assert sorted(Dice(1).order(50, "epoch", 3)) == list(range(50))
    assert Dice(1).order(50, "epoch", 3) != Dice(1).order(50, "epoch", 4)
