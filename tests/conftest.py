"""What holds for every test: offline, one thread, reproducible, and the strict world around it."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.pop("COLUMNS", None)  # the width of the terminal that pytest was started in is nothing to the commands
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS, on machines with a GPU

import hypothesis
import pytest
import torch

from second_device import run_on_second_device  # noqa: F401  (a fixture)
from simulated_cuda.fixture import run_on_simulated_cuda  # noqa: F401  (a fixture)
from strict_world import strict_world

torch.set_num_threads(1)  # the tensors here are small, and sums keep their order

TABLE = 40  # cases of one test that the default run takes

# `--hypothesis-profile=explore` looks for new failures; the default repeats the same examples.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("default")


class TorchRandom:
    """torch's generator as hypothesis wants to see it, so that an example repeats its draws."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # hypothesis keeps only a weak reference
hypothesis.register_random(TORCH_RANDOM)


@pytest.fixture(autouse=True)
def _strict_world(request: pytest.FixtureRequest) -> Iterator[None]:
    marked = request.node.get_closest_marker
    with strict_world(guard=marked("no_device_guard") is None, cuda=marked("gpu") is not None):
        yield


def _thin(items: list[pytest.Item]) -> None:
    """Mark as wide all but about `TABLE` cases of a test with a large table: every n-th one stays, beginning at a place
    that differs from test to test, so that tests over the same table keep different rows of it."""
    tables: dict[str, list[pytest.Item]] = {}
    for item in items:
        tables.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for name, rows in tables.items():
        every = -(-len(rows) // TABLE)
        start = zlib.crc32(name.encode()) % every
        for at, item in enumerate(rows):
            if at % every != start:
                item.add_marker(pytest.mark.wide)


@pytest.hookimpl(tryfirst=True)  # before pytest reads -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _thin(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
