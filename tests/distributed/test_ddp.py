"""DistributedDataParallel around an adapted model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import nerine
from nerine import DiagOFT, DoRA, DyLoRA, LoKr, LoRA
from nerine.errors import OptionError
from nerine.testing.battery import close
from small_world import ALGORITHMS, alone, attached, batch, copied, loss_of, model, stir, train
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


def chance_is_independent(rank: int, folder: Path) -> None:
    """Every process draws for itself; what they average stays the same in all."""
    for algorithm in (DyLoRA(rank=4), DoRA(LoRA(rank=2)), DiagOFT(block_size=2)):
        torch.manual_seed(rank)  # also before attach: DistributedDataParallel tells the values of the first
        network = nerine.attach(base := model(), algorithm, dropout=0.2, rank_dropout=0.3, module_dropout=0.3)
        wrapped = DistributedDataParallel(base)
        torch.manual_seed(rank)
        optimiser = torch.optim.AdamW(network.parameters(), lr=0.01)
        for step in range(4):
            optimiser.zero_grad()
            loss_of(wrapped, step, rank).backward()
            optimiser.step()
        drawn = torch.rand(1)
        for key, t in {**copied(network), "drawn": drawn}.items():
            other = t.clone()
            dist.broadcast(other, 0)
            assert torch.equal(t, other) == (key != "drawn" or rank == 0), key


def accumulated(rank: int, folder: Path) -> None:
    """Gradients that are gathered over two halves of a batch, with `no_sync`."""
    base, network = attached(DoRA(LoKr(rank=1)))
    stir(network)
    loss_of(base, 0).backward()
    want = {key: p.grad for key, p in network.named_parameters()}
    base, network = attached(DoRA(LoKr(rank=1)))
    stir(network)
    wrapped = DistributedDataParallel(base)
    x, y = batch(0, rank)
    with wrapped.no_sync():
        ((wrapped(x[:1]) - y[:1]).square().mean() / 2).backward()
    ((wrapped(x[1:]) - y[1:]).square().mean() / 2).backward()
    for key, p in network.named_parameters():
        close(p.grad, want[key], key)


def orders_and_errors(rank: int, folder: Path) -> None:
    wrapped = DistributedDataParallel(model())
    _, network = attached(LoRA(rank=2))
    nerine.save(network, file := folder / f"lora-{rank}.safetensors")
    for call in (lambda: nerine.attach(wrapped, LoRA(rank=2)), lambda: nerine.load(wrapped, file)):
        with pytest.raises(OptionError, match=r"attach to the model within it.*DistributedDataParallel\(model\)"):
            call()
    network = nerine.attach(wrapped.module, LoRA(rank=2), freeze=False)
    with pytest.raises(OptionError, match=r"inlet: DistributedDataParallel does not know.*first"):
        loss_of(wrapped, 0, rank)
    with torch.no_grad():  # to look at is fine
        loss_of(wrapped, 0, rank)
    network.detach()
    network = nerine.attach(wrapped.module, LoRA(rank=2), freeze=False, own=False)
    told: list[logging.LogRecord] = []
    logging.getLogger("nerine").addHandler(handler := logging.Handler())
    handler.emit = told.append  # type: ignore[method-assign]
    for step in range(2):
        loss_of(wrapped, step, rank).backward()
    assert ["own=False" in record.getMessage() for record in told] == [True]
    for p in network.parameters():  # as the message says
        dist.all_reduce(p.grad)
    network.detach()
    # adapters that were there before, in the order that the message asks for
    network = nerine.load(wrapped.module, file)
    again = DistributedDataParallel(wrapped.module)
    loss_of(again, 0, rank).backward()
    assert all(p.grad is not None for p in network.parameters())


def test_ddp(run_on_two: Callable[..., None]) -> None:
    run_on_two(equal_to_one_process, chance_is_independent, accumulated, orders_and_errors)
