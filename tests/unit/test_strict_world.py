"""The strict world is strict where it should be, and only there."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from strict_world import DeviceGuard, MixedDevices, strict_world

MIXED = {
    "add": lambda cpu, other: cpu(3) + other(3),
    "linear": lambda cpu, other: F.linear(cpu(2, 4), other(3, 4)),
    "linear, bias": lambda cpu, other: F.linear(cpu(2, 4), cpu(3, 4), other(3)),
    "conv2d": lambda cpu, other: F.conv2d(cpu(1, 2, 5, 5), other(3, 2, 3, 3)),
    "einsum": lambda cpu, other: torch.einsum("oi,ri->or", cpu(3, 4), other(2, 4)),
    "kron": lambda cpu, other: torch.kron(cpu(2, 2), other(3, 2)),
    "mul_": lambda cpu, other: cpu(3).mul_(other(3)),
    "cat": lambda cpu, other: torch.cat([cpu(3), other(3)]),
    "out=": lambda cpu, other: torch.mul(cpu(3), 2.0, out=other(3)),
    "layer_norm": lambda cpu, other: F.layer_norm(cpu(2, 3), (3,), other(3)),
    "embedding": lambda cpu, other: F.embedding(cpu(2).long(), other(5, 3)),
}
ONE_WAY = {
    "number on the other device": lambda: on_cpu(3) * on_meta(),
    "foreign index": lambda: on_cpu(3)[on_meta(2).long()],
    "foreign value": lambda: on_meta(3).index_put_((on_cpu(2).long(),), on_cpu(2)),
}


def on_cpu(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def on_meta(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device="meta")


@pytest.mark.parametrize("swap", [False, True], ids=["cpu first", "meta first"])
@pytest.mark.parametrize("name", MIXED)
def test_guard_refuses_mixed_devices(name: str, swap: bool) -> None:
    makers = (on_meta, on_cpu) if swap else (on_cpu, on_meta)
    with pytest.raises(MixedDevices, match="cpu and on meta"):
        MIXED[name](*makers)


@pytest.mark.parametrize("name", ONE_WAY)
def test_guard_knows_which_of_the_two_may_stay_on_the_cpu(name: str) -> None:
    with pytest.raises(MixedDevices):
        ONE_WAY[name]()


def test_guard_sees_the_backward_pass() -> None:
    class Careless(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * on_meta(3)

    y = Careless.apply(on_cpu(3).requires_grad_())
    with pytest.raises(MixedDevices):
        y.sum().backward()


def test_guard_works_in_inference_mode() -> None:
    with torch.inference_mode(), pytest.raises(MixedDevices):
        F.linear(on_cpu(2, 4), on_meta(3, 4))


@pytest.mark.parametrize(
    "harmless",
    [
        lambda: on_meta(3) * torch.tensor(2.0),
        lambda: on_meta(3).mul_(torch.tensor(2.0)),
        lambda: torch.where(on_meta(3) > 0, on_meta(3), torch.tensor(0.0)),
        lambda: on_meta(3).copy_(on_cpu(3)),
        lambda: on_cpu(3).to("meta"),
        lambda: on_cpu(3).to("meta", torch.float16),
        lambda: on_meta(4, 3)[torch.tensor([0, 2])],
        lambda: on_meta(4, 3).index_put_((torch.tensor([0, 2]),), torch.tensor(1.0)),
        lambda: torch.nn.Linear(3, 2).to("meta")(on_meta(1, 3)),
        lambda: torch.empty_like(on_cpu(3), device="meta"),
    ],
)
def test_guard_lets_through_what_a_gpu_does(harmless) -> None:
    assert harmless().device.type == "meta"


@pytest.mark.no_device_guard
def test_marker_turns_the_guard_off() -> None:
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_guard_is_on_by_default() -> None:
    assert isinstance(torch.utils._python_dispatch._get_current_dispatch_mode(), DeviceGuard)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_fresh_memory_is_poisoned(dtype: torch.dtype) -> None:
    fresh = (
        torch.empty(3, dtype=dtype),
        torch.empty_like(torch.zeros(3, dtype=dtype)),
        torch.zeros(1, dtype=dtype).new_empty(3),
    )
    assert all(t.float().isnan().all() for t in fresh)


def test_randomness_neither_leaks_in_nor_out() -> None:
    before = torch.get_rng_state()
    with strict_world():
        first = torch.randn(3)
    torch.randn(7)
    with strict_world():
        again = torch.randn(3)
    torch.set_rng_state(before)
    with strict_world(seed=1):
        other = torch.randn(3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_world_leaves_the_settings_as_they_were() -> None:
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    with strict_world():
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_one_thread() -> None:
    assert torch.get_num_threads() == 1


DRAWN: dict[int, torch.Tensor] = {}


@given(st.integers(0, 3))
def test_hypothesis_repeats_the_draws_of_an_example(n: int) -> None:
    draw = torch.randn(3)
    assert torch.equal(DRAWN.setdefault(n, draw), draw)


def test_compile_works_under_the_guard() -> None:
    """A silent fallback to eager would not count: the backend must be handed the graph."""
    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return aot_eager(graph, example_inputs)

    torch._dynamo.reset()
    layer = torch.nn.Linear(4, 3)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = torch.randn(2, 4)
    y = compiled(x)
    y.sum().backward()
    assert len(graphs) == 1
    assert torch.equal(y, layer(x))
    assert layer.weight.grad is not None
