"""Train = merge: what the adapted layer computes is what the changed weight computes, and so are all gradients."""

from __future__ import annotations

import pytest

from contract.cases import ALGORITHMS, TINY, few, places_of
from nerine.algorithms import Algorithm
from nerine.testing.battery import check_faces, check_gradients, check_output, check_row_norm

pytestmark = [
    pytest.mark.no_device_guard,  # one device only, and thousands of small operations
    pytest.mark.filterwarnings("ignore:Using padding='same'"),  # torch's, of the base layer
]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_faces(algorithm: Algorithm) -> None:
    for place in places_of(algorithm):
        check_faces(algorithm, place)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_output_is_base_and_deviation(algorithm: Algorithm) -> None:
    for place in few(algorithm):
        check_output(algorithm, place)


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if getattr(a, "axis", "") != "in"], ids=str)
def test_row_norm(algorithm: Algorithm) -> None:
    for place in places_of(algorithm):
        check_row_norm(algorithm, place)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_gradients_by_finite_differences(algorithm: Algorithm) -> None:
    for place in places_of(algorithm, TINY):
        check_gradients(algorithm, place)
