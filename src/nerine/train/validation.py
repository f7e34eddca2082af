"""The loss of held-out pictures, at noise and times that are always the same: it moves only when the adapters do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from nerine.model.network import Network
from nerine.train.preparation import Run
from nerine.train.step import moved
from nerine.train.timesteps import fixed_times

__all__ = ["held_out_loss", "resting"]


@torch.no_grad()
def held_out_loss(run: Run) -> float:
    """The mean over the held-out pictures and the fixed times, unweighted but for what the objective says of times.

    Processes share the work, except where each holds only pieces of the denoiser and must join in every call.
    """
    feed, accelerator = run.held_out, run.accelerator
    assert feed is not None
    world, rank = (1, 0) if run.settings.base.shard else (accelerator.num_processes, accelerator.process_index)
    times = fixed_times(run.settings.objective, run.step.objective.prediction, run.settings.validation.validation_times)
    sums = torch.zeros(2, dtype=torch.float64)
    with resting(run.network):
        for number in range(rank, feed.order.per_epoch, world):
            batch = moved(feed.batch(feed.order.batch(number)), run.device, run.dtype)
            for index, time in enumerate(times.tolist()):
                placed = replace(batch, where=tuple((n * len(times) + index, i) for n, i in batch.where))
                at = torch.full((len(batch.captions),), time, device=run.device)
                with accelerator.autocast():
                    losses = run.step(placed, at, "validate")
                sums += torch.tensor([float(losses.double().sum()), len(losses)], dtype=torch.float64)
    if world > 1:
        sums = accelerator.reduce(sums.to(run.device, torch.float32), reduction="sum").double().cpu()
    return float(sums[0] / sums[1])


@contextmanager
def resting(network: Network) -> Iterator[None]:
    """The adapters without their dropouts, and unchanged, for the length of a `with` block."""
    network.eval()
    try:
        with network.cached():
            yield
    finally:
        network.train()
