"""DistributedDataParallel around an adapted model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nerine.testing.battery import close
from small_world import ALGORITHMS, alone, attached, copied, stir, train
from two_processes import Failures


def equal_to_one_process(rank: int, folder: Path) -> None:
    failures = Failures()
    for algorithm in ALGORITHMS:
        with failures.case(algorithm):
            losses, want = alone(algorithm)
            model, network = attached(algorithm)
            stir(network)
            wrapped = DistributedDataParallel(model)
            got = train(wrapped, network.parameters(), rank)
            mean = torch.tensor(got, dtype=torch.float64)
            dist.all_reduce(mean)
            close(mean / 2, torch.tensor(losses, dtype=torch.float64), "losses")
            for key, tensor in copied(network).items():
                close(tensor, want[key], key)
    failures.tell()


def test_ddp_equals_one_process(run_on_two: Callable[..., None]) -> None:
    run_on_two(equal_to_one_process)
