"""Train = export = reload: a file gives back the tensors and the output."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from contract.cases import ALGORITHMS, few, places_for
from nerine.algorithms import Algorithm
from nerine.testing.battery import check_file

pytestmark = [
    pytest.mark.no_device_guard,  # one device only, and thousands of small operations
    pytest.mark.filterwarnings("ignore:Using padding='same'"),  # torch's, of the base layer
]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_file(algorithm: Algorithm, tmp_path: Path) -> None:
    for place in places_for(algorithm):
        check_file(algorithm, place, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_file_in_half_precision(algorithm: Algorithm, dtype: torch.dtype, tmp_path: Path) -> None:
    for place in few(algorithm):
        check_file(algorithm, place, tmp_path, dtype)
