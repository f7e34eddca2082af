"""Merging gives what the forward gives, and unmerging gives back the very bits."""

from __future__ import annotations

import pytest
import torch

from contract.cases import ALGORITHMS, few, places_for
from nerine.algorithms import Algorithm
from nerine.testing.battery import check_merge, check_unmerge

pytestmark = [
    pytest.mark.no_device_guard,  # one device only, and thousands of small operations
    pytest.mark.filterwarnings("ignore:Using padding='same'"),  # torch's, of the base layer
]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_merge_equals_forward(algorithm: Algorithm) -> None:
    for place in places_for(algorithm):
        check_merge(algorithm, place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_unmerge_is_bitwise(algorithm: Algorithm, dtype: torch.dtype) -> None:
    for place in few(algorithm):
        check_unmerge(algorithm, place, dtype)
