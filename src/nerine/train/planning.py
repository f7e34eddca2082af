"""The dry run: what a run would train, need and take, from its settings, its pictures and a few steps on trial."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from nerine.tables import listing, table
from nerine.train.loop import Loop, own_randomness
from nerine.train.preparation import Run, engine, prepare
from nerine.train.settings import TrainSettings
from nerine.train.watching import Watcher

__all__ = ["TrainPlan", "plan_training"]

TRIED = 3  # steps, of which the first warms up


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """What `train` would do. Memory is in bytes: `base_bytes` the frozen weights, `adapter_bytes` values, gradients
    and the optimiser's state, `peak_bytes` the most that a step took on a GPU (None on a CPU)."""

    base: str
    layers: int
    params: int
    algorithms: tuple[str, ...]
    pictures: int
    skipped: int
    batch: int
    steps: int
    epochs: float
    seconds_per_step: float
    base_bytes: int
    adapter_bytes: int
    peak_bytes: int | None
    by_layer: str
    data: str

    @property
    def seconds(self) -> float:
        """Time of all steps, without validation and pictures."""
        return self.steps * self.seconds_per_step

    def to_dict(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("by_layer", "data")}
        return {**found, "seconds": self.seconds}

    def __str__(self) -> str:
        peak = [("most in a step", f"{self.peak_bytes / 1e9:.2f} GB")] if self.peak_bytes is not None else []
        hours, rest = divmod(self.seconds, 3600)
        rows = [
            ("base", self.base),
            ("adapters", f"{', '.join(self.algorithms)} on {self.layers} layers: {self.params:,} values"),
            ("pictures", f"{self.pictures} ({self.skipped} skipped), {self.batch} at once"),
            ("steps", f"{self.steps:,}, each picture {self.epochs:.1f} times"),
            ("memory, base", f"{self.base_bytes / 1e6:,.1f} MB"),
            ("memory, trained", f"{self.adapter_bytes / 1e6:,.1f} MB (values, gradients, optimiser)"),
            *peak,
            ("time", f"{self.seconds_per_step:.3f} s a step (tried), {hours:.0f} h {rest / 60:.0f} min in all"),
        ]
        return f"{self.data}\n\n{listing(rows)}"


def plan_training(settings: TrainSettings, watcher: Watcher | None = None) -> TrainPlan:
    """Prepare a run, make a few steps, and tell what it is; nothing is written but caches that are asked for.

    Raises:
        NerineError: as `train`.
    """
    accelerator = engine(_quiet(settings))
    with own_randomness(accelerator.device):
        run = prepare(_quiet(settings), Watcher() if watcher is None else watcher, accelerator)
        seconds = _try(run)
    network = run.network
    held = sum(_bytes(p) for part in run.parts.values() for p in part.parameters())
    own = sum(_bytes(p) for p in network.parameters())
    moments = [v for state in run.plain_optimizer.state.values() for v in state.values()]
    state = sum(_bytes(v) for v in moments if isinstance(v, torch.Tensor))
    rows = [(path, str(a.algorithm), f"{_count(a):,}") for path, _, a in network.adapters()]
    seen = run.steps * settings.optimizer.accumulate * run.global_batch
    return TrainPlan(
        base=settings.base.base,
        layers=len(network),
        params=_count(network),
        algorithms=tuple(sorted({str(a.algorithm) for *_, a in network.adapters()})),
        pictures=run.data.pictures,
        skipped=len(run.data.skipped),
        batch=run.global_batch * settings.optimizer.accumulate,
        steps=run.steps,
        epochs=seen / max(1, run.feed.order.per_epoch * run.global_batch),
        seconds_per_step=seconds,
        base_bytes=held - own,
        adapter_bytes=2 * own + state,
        peak_bytes=torch.cuda.max_memory_allocated(run.device) if run.device.type == "cuda" else None,
        by_layer=table(("layer", "algorithm", "values"), rows),
        data=str(run.data),
    )


def _quiet(settings: TrainSettings) -> TrainSettings:
    """The same without trackers."""
    return replace(settings, output=replace(settings.output, trackers=()))


def _try(run: Run) -> float:
    """Seconds of a step: the median of a few after the first."""
    loop = Loop(run, Watcher())
    batches = loop.batches()
    times = []
    for step in range(min(TRIED, run.steps)):
        began = time.monotonic()
        loss, _ = loop.step(step, batches)
        float(loss)  # waits for the device
        times.append(time.monotonic() - began)
    return statistics.median(times[1:] or times) if times else math.nan


def _count(of: Any) -> int:
    return sum(p.numel() for p in of.parameters())


def _bytes(t: torch.Tensor) -> int:
    return t.numel() * t.element_size()
