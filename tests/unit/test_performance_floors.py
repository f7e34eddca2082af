"""The floors of the performance suite: operations against torch's own counter, passes and their worth by hand."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
R = 16  # the rank of the rows
POSITIONS, INPUTS, OUTPUTS = 40, 64, 96

pytestmark = pytest.mark.no_device_guard


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("floor_counts", "step_rows", "step_floor", "suite_cases", "suite_models")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def counted(forward: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Operations of forward and backward, as torch counts them."""
    x = x.detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        forward(x).sum().backward()
    return int(counter.get_total_flops())


def flops(path: Any) -> float:
    return sum(work.flops for work in path)


def linear(suite: Any) -> Any:
    return suite.step_rows.problem_of(lambda: nn.Linear(INPUTS, OUTPUTS), (POSITIONS, INPUTS))


def conv(suite: Any) -> Any:
    return suite.step_rows.problem_of(lambda: nn.Conv2d(32, 64, 3, padding=1), (2, 32, 5, 7))


def plain(suite: Any, p: Any, kind: str) -> Callable[[Tensor], Tensor]:
    """The low-rank maps in the plainest torch; in-place products are no part of torch's count."""
    t = p.leaves(suite.step_rows.Row(kind))

    def forward(x: Tensor) -> Tensor:
        y = functional.linear(x, p.weight, p.bias)
        if kind == "lora":
            return y + x @ t["down"].T @ t["up"].T
        if kind == "tlora":
            return y + x @ t["q"].T @ (t["p"] * t["lambda"]).T - x @ t["base_q"].T @ (t["base_p"] * t["base_lambda"]).T
        return y + x @ t["a2"].T @ (p.weight @ t["a1"]).T + x @ t["b2"].T @ t["b1"].T

    return forward


@pytest.mark.parametrize(("kind", "way"), [("lora", "beside"), ("tlora", "beside"), ("glora", "weight times a1")])
def test_operations_of_low_rank_paths(suite: Any, kind: str, way: str) -> None:
    p = linear(suite)
    size = suite.suite_cases.size_of(p)
    frozen = counted(p.layer, p.x)
    assert frozen == 2 * size.product == 4 * POSITIONS * INPUTS * OUTPUTS
    assert flops(suite.floor_counts.paths(kind, None, size)[way]) == counted(plain(suite, p, kind), p.x) - frozen


@pytest.mark.parametrize(
    ("kind", "way", "make"),
    [
        ("lokr", "beside", linear),
        ("loha", "weight", linear),
        ("full", "weight", linear),
        ("lora", "beside", conv),
        ("lokr", "beside", conv),
        ("loha", "weight", conv),
        ("full", "weight", conv),
        ("ia3", "output", conv),
        ("ia3-input", "input", linear),
    ],
)
def test_operations_of_the_maps_by_hand(suite: Any, kind: str, way: str, make: Callable[[Any], Any]) -> None:
    p = make(suite)
    row = suite.step_rows.Row(kind)
    by_hand = suite.step_floor.floor(p, row, p.leaves(row))
    extra = counted(by_hand, p.x) - counted(p.layer, p.x)
    assert flops(suite.floor_counts.paths(kind, None, suite.suite_cases.size_of(p))[way]) == extra


def test_operations_of_turns(suite: Any) -> None:
    """Blocks of 32 of the outputs: three of 64."""
    p = suite.step_rows.problem_of(lambda: nn.Linear(INPUTS, 64), (POSITIONS, INPUTS))
    turns = torch.randn(2, 32, 32).requires_grad_()

    def forward(x: Tensor) -> Tensor:
        y = functional.linear(x, p.weight).reshape(-1, 2, 32)
        return torch.einsum("nbi,bij->nbj", y, turns)

    extra = counted(forward, p.x) - counted(p.layer, p.x)
    assert flops(suite.floor_counts.paths("diag-oft", None, suite.suite_cases.size_of(p))["output"]) == extra


def test_operations_of_norms(suite: Any) -> None:
    """W·downᵀ and back, and what is of the size of a rank by a channel, which the floor leaves out."""
    p = linear(suite)
    size, weight = suite.suite_cases.size_of(p), INPUTS * OUTPUTS
    plain_row, dora = suite.step_rows.Row("lora"), suite.step_rows.Row("lora", "out")
    extra = counted(suite.step_floor.floor(p, dora, p.leaves(dora)), p.x) - counted(
        suite.step_floor.floor(p, plain_row, p.leaves(plain_row)), p.x
    )
    paths = suite.floor_counts.paths
    mine = flops(paths("lora", "out", size)["beside"]) - flops(paths("lora", None, size)["beside"])
    assert mine == 4 * weight * R
    assert mine <= extra <= mine + 12 * R * R * (INPUTS + OUTPUTS)


def test_passes_of_lora(suite: Any) -> None:
    """Six kernels of a layer of 3 outputs and 2 inputs on 5 positions, at rank 1: what each reads and writes."""
    counts = suite.floor_counts
    path = counts.low_rank(counts.Size(3, 2, 1, 5, 5), 1)
    assert [work.elements for work in path] == [
        10 + 2 + 5,  # x, down, h
        5 + 3 + 15 + 15,  # h, up, y read and written
        15 + 3 + 5,  # g, up, gradient of h
        15 + 5 + 3,  # g, h, gradient of up
        10 + 5 + 2,  # x, gradient of h, of down
        5 + 2 + 10 + 10,  # gradient of h, down, that of x read and written
    ]


def test_a_kernel_takes_the_longer_of_its_two(suite: Any) -> None:
    counts = suite.floor_counts
    rates = counts.Rates(flops=100.0, bytes=80.0)
    assert counts.seconds([counts.Work(200, 10), counts.Work(10, 100)], rates) == pytest.approx(2.0 + 5.0)
    assert counts.seconds([counts.Work(0, 100)], rates, bytes_each=2) == pytest.approx(2.5)


def test_the_cheapest_way_counts(suite: Any) -> None:
    """LoHa as one of rank r² pays where the layer is large; Full has one way."""
    counts = suite.floor_counts
    rates = counts.Rates(flops=2e11, bytes=2e10)
    large, small = counts.Size(3072, 3072, 1, 2048, 2048), counts.Size(640, 640, 1, 2048, 2048)
    assert counts.floor("loha", None, large, rates)[1] == "rank r²"
    assert counts.floor("loha", None, small, rates)[1] == "weight"
    seconds, way = counts.floor("full", None, large, rates)
    assert way == "weight"
    assert 1.5 < 1 + seconds / (2 * large.product / rates.flops) < 1.7


def test_every_row_has_a_floor_on_every_layer(suite: Any) -> None:
    counts = suite.floor_counts
    rates = counts.Rates(2e11, 2e10)
    for size in (counts.Size(320, 320, 9, 4096, 4096), counts.Size(4, 32, 9, 64, 64), counts.Size(3072, 768, 1, 7, 7)):
        for row in suite.step_rows.ROWS.values():
            assert counts.floor(row.kind, row.axis, size, rates)[0] > 0, (row.name, size)


def test_layers_of_a_model_are_counted_with_their_positions(suite: Any) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Flatten(2), nn.Linear(6, 5)
    )
    layers = suite.suite_models.layers_of(model, torch.zeros(2, 3, 4, 6))
    found = {one.weight: (count, one.size) for one, count in layers.items()}
    Size = suite.floor_counts.Size
    assert found == {
        (8, 3, 3, 3): (1, Size(8, 3, 9, 12, 48)),
        (8, 8, 1, 1): (2, Size(8, 8, 1, 12, 12)),
        (5, 6): (1, Size(5, 6, 1, 16, 16)),
    }
