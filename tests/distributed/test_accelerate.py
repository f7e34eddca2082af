"""accelerate's `Accelerator` in two processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import nerine
from nerine import DoRA, LoKr, LoRA
from nerine.errors import OptionError
from nerine.testing.battery import close
from small_world import alone, attached, batch, copied, model, stir

pytest.importorskip("accelerate", reason="needs the extra: pip install nerine[train]")


def step(accelerator: object, wrapped: object, optimiser: torch.optim.Optimizer, number: int, rank: int) -> None:
    optimiser.zero_grad()
    torch.manual_seed(number)
    x, y = batch(number, rank)
    accelerator.backward((wrapped(x) - y).square().mean())  # type: ignore[attr-defined, operator]
    optimiser.step()


def equal_to_one_process(rank: int, folder: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    algorithm = DoRA(LoKr(rank=1))
    _, want = alone(algorithm)
    base, network = attached(algorithm)
    stir(network)
    optimiser = torch.optim.SGD(list(network.parameters()), lr=0.1, momentum=0.9)
    wrapped, optimiser = accelerator.prepare(base, optimiser)
    step(accelerator, wrapped, optimiser, 0, rank)
    accelerator.save_state(str(folder / "state"))
    at_save = copied(network)
    step(accelerator, wrapped, optimiser, 1, rank)
    for key, t in copied(network).items():
        close(t, want[key], key)
    # back to the first step, and on again
    accelerator.load_state(str(folder / "state"))
    for key, t in copied(network).items():
        assert torch.equal(t, at_save[key]), key
    step(accelerator, wrapped, optimiser, 1, rank)
    for key, t in copied(network).items():
        close(t, want[key], key)
    if accelerator.is_main_process:
        nerine.save(network, folder / "adapter.safetensors")
    accelerator.wait_for_everyone()
    _, again = attached(algorithm)
    nerine.load(again, folder / "adapter.safetensors")
    for key, t in copied(again).items():
        close(t, want[key], key)


def orders_and_errors(rank: int, folder: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    wrapped = accelerator.prepare(model())
    with pytest.raises(OptionError, match=r"DistributedDataParallel"):
        nerine.attach(wrapped, LoRA(rank=2))
    inside = accelerator.unwrap_model(wrapped)
    network = nerine.attach(inside, LoRA(rank=2))
    with pytest.raises(OptionError, match=r"does not know this adapter"):
        wrapped(batch(0)[0])
    network.detach()


def test_accelerate(run_on_two: Callable[..., None]) -> None:
    run_on_two(equal_to_one_process, orders_and_errors)
