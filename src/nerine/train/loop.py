"""The loop: steps, and what happens between them.

A step draws its batch, its times and its noise as functions of its number, so that a run which goes on from a
checkpoint makes the same steps, bit by bit, as one that was never interrupted. torch's own generators, from
which dropouts are drawn, are set anew in each step for the same reason (see `own_randomness`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nerine.api import save
from nerine.errors import NerineError
from nerine.files.detect import dialect_named
from nerine.model.sharded import at_rest, whole
from nerine.train.batch import Batch
from nerine.train.checkpoints import Checkpoints, gathered, scattered
from nerine.train.config import to_toml
from nerine.train.history import History
from nerine.train.optimizer import evaluating, set_rate
from nerine.train.preparation import Run
from nerine.train.resuming import check_same
from nerine.train.sampling import draw_samples
from nerine.train.step import moved
from nerine.train.timesteps import draw_times
from nerine.train.validation import held_out_loss
from nerine.train.watching import Watcher

__all__ = ["Diverged", "Loop", "own_randomness"]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ADAPTER = "adapter"  # the name of the file in a checkpoint


class Diverged(NerineError, ArithmeticError):
    """The loss is no number any more; going on would teach nothing."""


class Pending(NamedTuple):
    """A step whose loss has not been asked for yet: the device may still be at it."""

    step: int
    loss: Tensor
    norm: Tensor
    lr: float
    seconds: float


class Loop:
    """Makes the steps of a run from `first` on; `run.steps` of them in all, of which `done` have been made."""

    def __init__(self, run: Run, watcher: Watcher) -> None:
        settings = run.settings
        self.run = run
        self.watcher = watcher
        self.first = self.done = 0
        self.seconds = 0.0
        self.checkpoints = Checkpoints(settings.output.out / "checkpoints", settings.output.keep)
        self.history = History(settings.output.out / "history.jsonl")
        self.every = {
            "save": settings.output.save_every or max(1, run.steps // 10),
            "validate": (settings.validation.validate_every or max(1, run.steps // 10)) if run.held_out else 0,
            "sample": (settings.samples.sample_every or max(1, run.steps // 4)) if settings.samples.prompts else 0,
        }
        self._pending: Pending | None = None
        self._parameters = list(run.network.parameters())
        self._memory = _memory_of(run.device)
        self._best = math.inf

    # -- the way through -----------------------------------------------------------------------------------------------
    def resume(self) -> int:
        """Go to the latest checkpoint, if there is one; the number of steps that are behind it."""
        latest = self.checkpoints.latest()
        if latest is not None:
            self._take(latest.state())
            self.first = self.done = latest.step
        if self.run.is_first:
            self.history.rewind(self.first if latest is not None else -1)
        return self.first

    def go(self) -> bool:
        """Make the steps that are left; whether the run is at its end, and not stopped before it."""
        run = self.run
        if self.first == 0:
            self._look(0)
        batches = self.batches()
        for step in range(self.first, run.steps):
            self.advance(step, batches)
            self.done = step + 1
            stop = self._is_stopped()
            self._between(step + 1, stop)
            if stop and step + 1 < run.steps:
                return False
        return True

    def advance(self, step: int, batches: Iterator[Batch]) -> None:
        """Make a step, and put the one before it into the history while the device is at this one."""
        began = time.monotonic()
        loss, norm = self.step(step, batches)
        self._flush()
        self._pending = Pending(step + 1, loss, norm, self.run.lr, time.monotonic() - began)

    def batches(self) -> Iterator[Batch]:
        run, accumulate = self.run, self.run.settings.optimizer.accumulate
        accelerator = run.accelerator
        yield from run.feed.batches(
            self.first * accumulate,
            run.steps * accumulate,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )

    def step(self, step: int, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
        """One step of the optimiser: the loss, and the norm of the gradients before they are clipped."""
        run, settings = self.run, self.run.settings
        accelerator, optimizer, dice = run.accelerator, run.optimizer, run.step.dice
        is_wrapped = not settings.base.shard
        torch.manual_seed(dice.number("torch", step, accelerator.process_index))
        set_rate(optimizer, run.rates(step))
        total, norm = torch.zeros((), device=run.device), torch.zeros((), device=run.device)
        for _ in range(settings.optimizer.accumulate):
            batch = moved(next(batches), run.device, run.dtype)
            times = draw_times(settings.objective, run.step.objective.prediction, dice, batch.where).to(run.device)
            with accelerator.accumulate(*([run.model] if is_wrapped else [])):
                with nullcontext() if is_wrapped else accelerator.autocast():
                    loss = run.model(batch, times).mean()
                accelerator.backward(loss)
                total += loss.detach().float() / settings.optimizer.accumulate
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self._parameters, settings.optimizer.clip or math.inf)
                optimizer.step()
                optimizer.zero_grad()
        if settings.optimizer.max_norm:
            run.network.max_norm(settings.optimizer.max_norm)
        if run.ema is not None:
            run.ema.update(step)
        return total, whole(norm)

    def _flush(self) -> None:
        """Put the step before into the history, now that its loss must be there.

        Raises:
            Diverged: it is no number.
        """
        if self._pending is None:
            return
        done, self._pending = self._pending, None
        run = self.run
        loss = done.loss
        if run.accelerator.num_processes > 1:
            loss = run.accelerator.reduce(loss, reduction="mean")
        row = {
            "step": done.step,
            "loss": float(loss),
            "lr": done.lr,
            "grad_norm": float(done.norm),
            "seconds": done.seconds,
            "memory": self._memory(),
        }
        self.seconds += done.seconds
        self._write(row)
        self.watcher.stepped(row)
        if not math.isfinite(row["loss"]):
            raise Diverged(
                f"the loss of step {done.step} is {row['loss']}: a lower lr, a longer warmup or bf16 in place of fp16 "
                f"may help. The checkpoints in {self.checkpoints.folder} are from before"
            )

    def _write(self, row: Mapping[str, Any]) -> None:
        if self.run.is_first:
            self.history.append(row)
        numbers = {name: value for name, value in row.items() if name != "step"}
        if self.run.settings.output.trackers:
            self.run.accelerator.log(numbers, step=row["step"])

    def _is_stopped(self) -> bool:
        """Whether anyone asks for the end; all processes come to the same answer."""
        asked, accelerator = self.watcher.stop(), self.run.accelerator
        if accelerator.num_processes == 1:
            return asked
        return bool(accelerator.reduce(torch.tensor(float(asked), device=self.run.device), reduction="sum") > 0)

    # -- between steps -------------------------------------------------------------------------------------------------
    def _between(self, step: int, stop: bool) -> None:
        """What is due after `step` steps: validation, pictures, a checkpoint."""
        is_last = step == self.run.steps
        due = {what for what, every in self.every.items() if every and (step % every == 0 or is_last)}
        if not due and not stop:
            return
        self._flush()
        validation = self._validate(step) if "validate" in due else None
        if "sample" in due:
            self._sample(step)
        is_best = validation is not None and validation < self._best
        if is_best and validation is not None:
            self._best = validation
        if "save" in due or stop or is_best:
            self._save(step, validation)

    def _look(self, step: int) -> None:
        """The base as it is, before the first step."""
        if self.every["validate"]:
            self._validate(step)
        if self.every["sample"]:
            self._sample(step)

    def _validate(self, step: int) -> float:
        run = self.run
        with evaluating(run.plain_optimizer):
            row: dict[str, Any] = {"step": step, "validation": held_out_loss(run)}
            if run.ema is not None:
                with run.ema.swapped():
                    row["validation_ema"] = held_out_loss(run)
        self._write(row)
        found: float = row.get("validation_ema", row["validation"])
        self.watcher.validated(step, found)
        return found

    def _sample(self, step: int) -> None:
        with evaluating(self.run.plain_optimizer), self._averaged():
            files = draw_samples(self.run, step)
        self.watcher.sampled(step, files)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averages in the place of the values, where there are some."""
        if self.run.ema is None:
            yield
        else:
            with self.run.ema.swapped():
                yield

    # -- checkpoints ---------------------------------------------------------------------------------------------------
    def _save(self, step: int, validation: float | None) -> None:
        run = self.run
        state = self._state(step)
        if run.is_first:
            done = self.checkpoints.save(step, validation, state, self.write_adapters)
            self.watcher.saved(step, done.folder)
        elif run.settings.base.shard:
            self.write_adapters(self.checkpoints.folder)  # joins in the gathering; the first process writes
        run.accelerator.wait_for_everyone()

    def write_adapters(self, folder: Path, name: str = ADAPTER) -> list[Path]:
        """Write the adapters into `folder` as other programs read them, and their averages beside them."""
        output = self.run.settings.output
        ending = "" if dialect_named(output.dialect).folder else ".safetensors"
        files = [folder / f"{name}{ending}"]
        with evaluating(self.run.plain_optimizer):
            self._write_adapter(files[0])
            if self.run.ema is not None:
                files.append(folder / f"{name}-ema{ending}")
                with self.run.ema.swapped():
                    self._write_adapter(files[1])
        return files

    def _write_adapter(self, file: Path) -> None:
        output = self.run.settings.output
        save(self.run.network, file, dialect=output.dialect, dtype=_DTYPES[output.save_dtype], hashes=True)

    def _state(self, step: int) -> dict[str, Any]:
        """All that the next step depends on, on the CPU."""
        run = self.run
        at_rest(run.parts)
        scaler = run.accelerator.scaler
        state: dict[str, Any] = {
            "step": step,
            "seconds": self.seconds,
            "best": self._best,
            "settings": to_toml(run.settings),
            "global_batch": run.global_batch,
            "steps": run.steps,
            "network": run.network.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "ema": run.ema.state_dict() if run.ema is not None else {},
            "scaler": scaler.state_dict() if scaler is not None else {},
        }
        found: dict[str, Any] = gathered(state)
        return found

    def _take(self, state: Mapping[str, Any]) -> None:
        """Everything as it was.

        Raises:
            OptionError: the settings are not those of the run that is to go on.
        """
        run = self.run
        check_same(run, state)
        run.network.load_state_dict(state["network"])
        run.optimizer.load_state_dict(scattered(state["optimizer"], run.plain_optimizer))
        if run.ema is not None:
            run.ema.load_state_dict(state["ema"])
        if run.accelerator.scaler is not None:
            run.accelerator.scaler.load_state_dict(state["scaler"])
        self.seconds, self._best = state["seconds"], state["best"]


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """torch's generators are the caller's again afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def _memory_of(device: torch.device) -> Callable[[], int]:
    """Tells the bytes that the run takes: on a GPU the most that was allocated, else what the process has."""
    if device.type == "cuda":
        return lambda: int(torch.cuda.max_memory_allocated(device))
    import psutil

    process = psutil.Process()
    return lambda: int(process.memory_info().rss)
