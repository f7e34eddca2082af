"""Spending bytes on layers: against every possible choice, and against the bound that no choice is below."""

from __future__ import annotations

import itertools
import random

import pytest

from nerine.errors import OptionError
from nerine.tools.budget import Option, bound, lower_hull, spread

Layers = list[list[Option]]
CASES = range(60)


def case(seed: int, layers: int = 4, points: int = 5) -> Layers:
    """Layers that may have nothing, or one of some points; errors fall with size in most, but not in all."""
    rng = random.Random(seed)
    found = []
    for _ in range(layers):
        whole = rng.uniform(1, 100)
        options = [Option(0, whole)]
        for _ in range(points - 1):
            size = rng.randint(1, 40)
            options.append(Option(size, whole * rng.random() ** (size / 10)))
        found.append(options)
    return found


def totals(layers: Layers, chosen: list[int]) -> tuple[int, float]:
    picked = [options[i] for options, i in zip(layers, chosen, strict=True)]
    return sum(o.bytes for o in picked), sum(o.error for o in picked)


def best(layers: Layers, size: int) -> float:
    """The least error of all choices that fit."""
    every = itertools.product(*(range(len(options)) for options in layers))
    return min(error for chosen in every for bytes, error in [totals(layers, list(chosen))] if bytes <= size)


def ends(layers: Layers) -> list[int]:
    """The sizes at which the steps on the hulls end, best first."""
    steps = []
    for options in layers:
        hull = lower_hull(options)
        for a, b in itertools.pairwise(hull):
            cost = options[b].bytes - options[a].bytes
            steps.append(((options[b].error - options[a].error) / cost, cost))
    return list(itertools.accumulate(cost for _, cost in sorted(steps)))


@pytest.mark.parametrize("seed", CASES)
def test_at_the_end_of_a_step_no_choice_is_better(seed: int) -> None:
    layers = case(seed)
    for size in ends(layers):
        taken, error = totals(layers, spread(layers, size))
        assert taken <= size
        assert error == pytest.approx(best(layers, size), rel=1e-12)


@pytest.mark.parametrize("seed", CASES)
def test_in_between_it_is_less_than_a_step_from_the_bound(seed: int) -> None:
    layers = case(seed)
    steps = [
        options[a].error - options[b].error for options in layers for a, b in itertools.pairwise(lower_hull(options))
    ]
    for size in range(0, 90, 7):
        taken, error = totals(layers, spread(layers, size))
        assert taken <= size
        assert bound(layers, size) <= best(layers, size) * (1 + 1e-12)
        assert best(layers, size) <= error * (1 + 1e-12)
        assert error <= bound(layers, size) + max(steps) * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(200))
def test_more_bytes_are_never_worse(seed: int) -> None:
    layers = case(seed, layers=6, points=7)
    errors = [totals(layers, spread(layers, size))[1] for size in range(160)]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))


def test_what_is_left_over_is_spent_on_what_still_fits() -> None:
    layers = [[Option(0, 10.0), Option(4, 9.0), Option(10, 0.0)]]  # the middle one is above the hull
    assert lower_hull(layers[0]) == [0, 2]
    assert spread(layers, 9) == [1]
    assert spread(layers, 10) == [2]


def test_of_options_of_one_size_the_best_and_of_equal_ones_the_first() -> None:
    options = [Option(0, 5.0), Option(2, 3.0), Option(2, 1.0), Option(2, 1.0), Option(3, 1.0)]
    assert lower_hull(options) == [0, 2]


def test_a_layer_that_must_have_something_gets_its_smallest() -> None:
    layers = [[Option(8, 1.0), Option(9, 0.0)], [Option(0, 7.0), Option(2, 0.0)]]
    assert spread(layers, 8) == [0, 0]
    assert spread(layers, 10) == [0, 1]


def test_a_size_that_is_too_small_is_refused() -> None:
    with pytest.raises(OptionError, match="7 bytes, and the least that there can be takes 8"):
        spread([[Option(8, 1.0)]], 7)
    assert spread([[Option(0, 1.0), Option(5, 0.0)]], 0) == [0]
