"""A deviation is zero at first, grows with strength, and adds up with others on the same layer."""

from __future__ import annotations

import pytest
import torch

from contract.cases import ALGORITHMS, ONE_OF_EACH, PLACES, few, places_for
from nerine.algorithms import Algorithm, DoRA, LoHa, LoKr, LoRA
from nerine.testing.battery import check_moves_at_first, check_stack, check_strength, check_zero_at_first
from nerine.testing.places import site_at

pytestmark = [
    pytest.mark.no_device_guard,  # one device only, and thousands of small operations
    pytest.mark.filterwarnings("ignore:Using padding='same'"),  # torch's, of the base layer
]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_zero_at_first(algorithm: Algorithm) -> None:
    for place in places_for(algorithm):
        check_zero_at_first(algorithm, place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_zero_at_first_in_other_formats(algorithm: Algorithm, dtype: torch.dtype) -> None:
    for place in few(algorithm):
        check_zero_at_first(algorithm, place, dtype)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_a_fresh_adapter_can_learn(algorithm: Algorithm) -> None:
    for place in few(algorithm):
        check_moves_at_first(algorithm, place)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_strength(algorithm: Algorithm) -> None:
    for place in few(algorithm):
        check_strength(algorithm, place)


MIXED = [
    (LoRA(rank=2, alpha=3.0), LoHa(rank=2, alpha=1.0)),
    (DoRA(LoRA(rank=2, alpha=1.0)), LoKr(rank=1, alpha=0.5, factor=2)),
    (DoRA(LoKr(full_matrix=True)), DoRA(LoHa(rank=2, alpha=1.5), axis="in"), LoRA(rank=3, alpha=2.0, tucker=True)),
    (LoKr(rank=1, alpha=2.0, unbalanced=True), LoRA(rank=1, alpha=0.5, scalar=True), DoRA(LoRA(rank=2, alpha=1.0))),
]


@pytest.mark.parametrize("algorithms", MIXED, ids=lambda m: "+".join(map(str, m)))
def test_stack(algorithms: tuple[Algorithm, ...]) -> None:
    for place in PLACES:
        if not any(algorithm.unsuited(site_at(place)) for algorithm in algorithms):
            check_stack(algorithms, place)


@pytest.mark.parametrize("algorithm", ONE_OF_EACH, ids=str)
def test_an_algorithm_stacks_on_itself(algorithm: Algorithm) -> None:
    for place in few(algorithm):
        check_stack((algorithm, algorithm), place)
