"""Everything that a run needs, made in the right order: engine, base, pictures, adapters, optimiser.

The order matters. Pictures and captions are encoded first, while the denoiser waits in the CPU's memory; then the
encoders make room for it. Adapters are put on before anything is wrapped or split, and the optimiser is made last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nerine.errors import MissingExtra, OptionError
from nerine.files.detect import dialect_named
from nerine.model.network import Network
from nerine.model.pipeline import Parts
from nerine.model.targets import find_targets
from nerine.train.adapting import adapt, freeze, trained_parts, what_of, where_of
from nerine.train.batch import Picture
from nerine.train.data.buckets import Buckets
from nerine.train.data.feed import Feed
from nerine.train.data.folder import DataReport, read_pictures, read_validation, split
from nerine.train.data.order import Order
from nerine.train.ema import Ema
from nerine.train.families.base import Base
from nerine.train.objective import Objective
from nerine.train.opening import open_base
from nerine.train.optimizer import class_of, groups_of, make_optimizer
from nerine.train.placing import checkpoint_activations, offload, quantize
from nerine.train.randomness import Dice
from nerine.train.rates import Rates
from nerine.train.settings import TrainSettings
from nerine.train.sharding import check_shared, shard
from nerine.train.step import Step
from nerine.train.watching import Watcher

__all__ = ["Run", "engine", "prepare", "sample_size"]

STEPS = 1000  # where neither steps nor epochs are given


@dataclass
class Run:
    """A run that can be stepped. `model` is `step` as the engine wraps it; `steps` is how many there will be."""

    settings: TrainSettings
    accelerator: Any
    base: Base
    parts: Parts
    network: Network
    step: Step
    model: nn.Module
    optimizer: Any
    rates: Rates
    ema: Ema | None
    feed: Feed
    held_out: Feed | None
    data: DataReport
    steps: int

    @property
    def device(self) -> torch.device:
        found: torch.device = self.accelerator.device
        return found

    @property
    def plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser without what the engine puts around it."""
        found: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return found

    @property
    def lr(self) -> float:
        """The learning rate of the first group now."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def global_batch(self) -> int:
        """Pictures at once in all processes together."""
        return self.settings.optimizer.batch_size * int(self.accelerator.num_processes)

    @property
    def dtype(self) -> torch.dtype:
        """The number format in which the denoiser is told of captions."""
        return next((p.dtype for p in self.base.denoiser.parameters() if p.dtype.itemsize > 1), torch.float32)


def engine(settings: TrainSettings) -> Any:
    """Accelerate's handle on the processes and devices.

    Raises:
        MissingExtra: it is not installed.
        OptionError: the device that was asked for is not there.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        raise MissingExtra(f'training needs accelerate ({error}): pip install "nerine[train]"') from error
    base = settings.base
    on_cpu = base.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    precision = base.mixed_precision
    if precision == "auto":
        precision = "no" if on_cpu else "bf16"
    output = settings.output
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        gradient_accumulation_steps=settings.optimizer.accumulate,
        log_with=list(output.trackers) or None,
        project_dir=output.out,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if base.device != "auto" and torch.device(base.device).type != accelerator.device.type:
        raise OptionError(f"device: expected {base.device}, but this machine trains on {accelerator.device}")
    if base.device != "auto" and torch.device(base.device).index not in (None, accelerator.device.index):
        raise OptionError(
            f"device: {base.device} is chosen by what is visible, as in CUDA_VISIBLE_DEVICES=1, with device = "
            f'"{accelerator.device.type}"'
        )
    return accelerator


def prepare(settings: TrainSettings, watcher: Watcher, accelerator: Any | None = None) -> Run:
    """A run with these settings, before its first step.

    Raises:
        NerineError: something of it cannot be; each says what.
    """
    accelerator = engine(settings) if accelerator is None else accelerator
    dice = Dice(settings.optimizer.seed)
    device, batch = accelerator.device, settings.optimizer.batch_size * accelerator.num_processes
    check_early(settings)
    base = open_base(settings.base)
    freeze(base)
    if settings.samples.prompts:
        base.check_size(*sample_size(settings, base))
    find_targets(trained_parts(base, settings.adapter), what_of(settings.adapter), *where_of(settings.adapter))
    pictures, held, data = _pictures(settings, dice)
    feeds = _feeds(settings, base, dice, batch, (pictures, held))
    data.buckets, data.filled = feeds[0].order.counts(), feeds[0].order.filled
    _encode(base, feeds, settings, watcher, accelerator)
    _place(base, settings, device)
    parts = trained_parts(base, settings.adapter)
    torch.manual_seed(dice.number("start"))
    network = adapt(parts, settings.adapter)
    if settings.base.shard:
        shard(base.denoiser, device)
    objective = Objective(settings.objective, base.prediction, base.pipeline.scheduler.config)
    step = Step(base, parts, network, objective, dice, settings.objective.penalty)
    if settings.base.compile:
        base.denoiser.compile()
    optimizer = make_optimizer(settings.optimizer, groups_of(network, settings.optimizer, *_rates(settings, base)))
    network.train()
    model, optimizer = _wrapped(step, optimizer, settings, accelerator)
    steps = _steps(settings, feeds[0])
    return Run(
        settings=settings,
        accelerator=accelerator,
        base=base,
        parts=parts,
        network=network,
        step=step,
        model=model,
        optimizer=optimizer,
        rates=Rates(settings.optimizer, steps),
        ema=Ema(network, settings.optimizer.ema) if settings.optimizer.ema else None,
        feed=feeds[0],
        held_out=feeds[1] if len(feeds) > 1 else None,
        data=data,
        steps=steps,
    )


def sample_size(settings: TrainSettings, base: Base) -> tuple[int, int]:
    """(width, height) of the pictures drawn on the way: as asked for, else of the resolution, in whole steps."""
    side = max(1, (settings.data.resolution or base.resolution) // base.step) * base.step
    return settings.samples.sample_width or side, settings.samples.sample_height or side


def check_early(settings: TrainSettings) -> None:
    """Whether names and packages are there that are asked for only after hours of encoding.

    Raises:
        OptionError, MissingExtra: one is not.
    """
    what_of(settings.adapter)
    class_of(settings.optimizer.optimizer)
    dialect_named(settings.output.dialect)
    if settings.base.shard:
        check_shared()


def _pictures(settings: TrainSettings, dice: Dice) -> tuple[list[Picture], list[Picture], DataReport]:
    """Those to train with, and those to validate with."""
    pictures, data = read_pictures(settings)
    held: list[Picture] = []
    if settings.validation.validation is not None:
        held = read_validation(settings.validation.validation, settings.data, data)
    elif settings.validation.validation_share:
        pictures, held = split(pictures, settings.validation.validation_share, dice)
    data.held_out = len(held)
    return pictures, held, data


def _feeds(
    settings: TrainSettings, base: Base, dice: Dice, batch: int, sets: Sequence[Sequence[Picture]]
) -> list[Feed]:
    """A feed for each set of pictures that has some; that of the training is the first."""
    data = settings.data
    buckets = Buckets(
        resolution=data.resolution or base.resolution,
        step=data.bucket_step or base.step,
        many=data.buckets,
        max_aspect=data.max_aspect,
        upscale=data.upscale,
    )
    folder = data.cache_folder or settings.output.out / "cache"
    feeds = []
    for number, pictures in enumerate(sets):
        if pictures:
            size = batch if number == 0 else min(len(pictures), 4 * batch)  # validation keeps nothing for backward
            order = Order(pictures, buckets, size, dice, is_random=data.crop == "random" and number == 0)
            feeds.append(Feed(base, order, data, folder, settings.adapter.text_encoder))
    return feeds


def _encode(base: Base, feeds: Sequence[Feed], settings: TrainSettings, watcher: Watcher, accelerator: Any) -> None:
    """Fill the caches, on the device, and let those parts rest in the CPU's memory that have nothing more to do."""
    device = accelerator.device
    for part in base.encoders:
        part.to(device)
    for feed in feeds:
        feed.prepare(watcher.preparing, accelerator.process_index, accelerator.num_processes)
    accelerator.wait_for_everyone()
    if all(feed.caches_latents for feed in feeds) and base.vae is not None:
        base.vae.to("cpu")
    if all(feed.caches_text for feed in feeds) and not settings.adapter.text_encoder:
        for part in base.text_encoders.values():
            part.to("cpu")


def _place(base: Base, settings: TrainSettings, device: torch.device) -> None:
    """The denoiser where it computes, in the number format that was asked for."""
    if settings.base.quantize != "none":
        quantize(base.denoiser, settings.base.quantize)
    if settings.base.gradient_checkpointing:
        checkpoint_activations(base.denoiser)
        for part in base.text_encoders.values() if settings.adapter.text_encoder else ():
            checkpoint_activations(part)
    if settings.base.offload != "none":
        offload(base.denoiser, device, settings.base.offload)
    else:
        base.denoiser.to(device)


def _wrapped(step: Step, optimizer: Any, settings: TrainSettings, accelerator: Any) -> tuple[nn.Module, Any]:
    """The step and the optimiser as the engine wants them; everything is in its place already."""
    if settings.base.shard:  # FSDP2 is in the denoiser itself
        return step, accelerator.prepare_optimizer(optimizer, device_placement=False)
    model, wrapped = accelerator.prepare(step, optimizer, device_placement=[False, False])
    return model, wrapped


def _rates(settings: TrainSettings, base: Base) -> tuple[float, float]:
    """The learning rates of the denoiser and of the text encoders."""
    lr = base.lr if settings.optimizer.lr is None else settings.optimizer.lr
    text = settings.adapter.text_encoder_lr
    return lr, lr if text is None else text


def _steps(settings: TrainSettings, feed: Feed) -> int:
    optimizer = settings.optimizer
    if optimizer.epochs is None:
        return optimizer.steps or STEPS
    return int(max(1, -(-optimizer.epochs * feed.order.per_epoch // optimizer.accumulate)))
