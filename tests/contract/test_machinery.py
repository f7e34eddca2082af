"""What happens to a module in real life: copies, checkpointing, compiling, little memory."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
import torch._dynamo
from torch import nn

import nerine
from contract.cases import ALGORITHMS, ONE_OF_EACH, PLACES, around, few
from nerine.algorithms import (
    BOFT,
    IA3,
    Algorithm,
    DiagOFT,
    DoRA,
    DyLoRA,
    Full,
    GLoRA,
    LoHa,
    LoKr,
    LoRA,
    OFTv2,
    TLoRA,
)
from nerine.model.layer import site_of
from nerine.testing.battery import (
    by_weight,
    check_checkpointing,
    check_copies,
    check_memory,
    input_at,
    is_random,
    layer_at,
    stir,
)
from nerine.testing.places import site_at

pytestmark = pytest.mark.no_device_guard  # one device only, and many small operations

NOISES = {"no noise": {}, "all noise": {"dropout": 0.3, "rank_dropout": 0.3, "module_dropout": 0.3}}


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_copies(algorithm: Algorithm) -> None:
    for place in few(algorithm):
        check_copies(algorithm, place)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("reentrant", [False, True], ids=["new", "reentrant"])
@pytest.mark.parametrize("algorithm", ONE_OF_EACH, ids=str)
def test_checkpointing(algorithm: Algorithm, reentrant: bool, noise: str) -> None:
    for place in few(algorithm):
        check_checkpointing(algorithm, place, reentrant, **NOISES[noise])


PLAIN = [algorithm for algorithm in ALGORITHMS if not isinstance(algorithm, DoRA)]
COMPILED = [(a, "eager", "all noise") for a in dict.fromkeys([*PLAIN, *ONE_OF_EACH])]
COMPILED += [(a, "aot_eager", "no noise") for a in ONE_OF_EACH]


@pytest.mark.parametrize(("algorithm", "backend", "noise"), COMPILED, ids=str)
def test_compile(algorithm: Algorithm, backend: str, noise: str) -> None:
    """One graph for a linear layer and a convolution, with gradients, on either path."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Flatten(2), nn.Linear(12, 10), nn.LayerNorm(10))
    model.requires_grad_(False)
    network = nerine.attach(model, algorithm, targets=nn.Module, **NOISES[noise])
    stir(network)
    for (*_, adapter), through_weight in zip(network.adapters(), (False, True), strict=False):
        adapter.prefers_weight = through_weight
    if noise == "all noise":
        network.set_timestep(torch.tensor(500.0))  # for who listens
    x = torch.randn(2, 4, 3, 4)

    def run(call) -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        y = call(x)
        y.square().mean().backward()
        return [y.detach(), *(p.grad for p in network.parameters())]

    compiled = run(torch.compile(model, backend=backend, fullgraph=True))
    for got, want in zip(compiled, run(model), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=1e-6)


MEMORY = tuple(
    chain.from_iterable(
        around(algorithm)
        for algorithm in (
            LoRA(rank=3, alpha=1.0),
            LoRA(rank=3, alpha=1.0, tucker=True, scalar=True),
            LoHa(rank=4, alpha=1.0),
            LoHa(rank=4, alpha=1.0, tucker=True),
            LoKr(rank=2, alpha=1.0),
            LoKr(rank=2, alpha=1.0, decompose_both=True, tucker=True),
            LoKr(full_matrix=True, factor=6, scalar=True),
            DyLoRA(rank=3, alpha=1.0),
            TLoRA(rank=3, alpha=1.0),
            GLoRA(rank=3, alpha=1.0),
            Full(),
            IA3(),
            IA3(on_input=True),
            DiagOFT(block_size=4),
            BOFT(block_size=4),
            OFTv2(block_size=4),
        )
    )
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", MEMORY, ids=str)
def test_memory_of_a_linear_layer(algorithm: Algorithm, dtype: torch.dtype) -> None:
    """Not even LoHa's factors of rank r² are kept: the limit is below their size."""
    check_memory(algorithm, nn.Linear(66, 48).to(dtype), torch.randn(3, 66, dtype=dtype), limit=16 * 48)


@pytest.mark.parametrize("algorithm", MEMORY, ids=str)
def test_memory_of_a_convolution(algorithm: Algorithm) -> None:
    check_memory(algorithm, nn.Conv2d(20, 24, 3, padding=1), torch.randn(1, 20, 3, 4), limit=20 * 24 * 9)


@pytest.mark.parametrize("algorithm", MEMORY, ids=str)
def test_memory_of_a_prime_layer(algorithm: Algorithm) -> None:
    """A Kronecker product of a prime side has a factor of the whole side; even so nothing of out x in is kept."""
    layer = nn.Linear(67, 48)
    if not algorithm.unsuited(site_of(layer)):
        check_memory(algorithm, layer, torch.randn(3, 67), limit=67 * 48)


@pytest.mark.parametrize("algorithm", MEMORY, ids=str)
def test_memory_of_a_grouped_convolution(algorithm: Algorithm) -> None:
    check_memory(algorithm, nn.Conv2d(40, 24, 3, groups=2), torch.randn(1, 40, 3, 3), limit=20 * 24 * 9)


@pytest.mark.parametrize("algorithm", ONE_OF_EACH, ids=str)
def test_double_use_of_one_layer_in_one_forward(algorithm: Algorithm) -> None:
    """A layer called twice before backward, as in a recurrent model."""
    place = next(p for p in PLACES if p.name == "linear square")
    if algorithm.unsuited(site_at(place)):
        return
    model = nn.Sequential(layer_at(place)).train(not is_random(algorithm))
    network = nerine.attach(model, algorithm)
    stir(network)
    x = input_at(place, requires_grad=True)
    model(model(x)).sum().backward()
    want = x.grad
    ((_, _, adapter),) = network.adapters()
    x.grad = None
    once = by_weight(algorithm, adapter.folded(), model[0], x)
    by_weight(algorithm, adapter.folded(), model[0], once).sum().backward()
    torch.testing.assert_close(x.grad, want)
