"""Pictures that are drawn on the way, always from the same noise, so that one sees what the adapters learn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from nerine.files.atomic import replacing_folder
from nerine.train.preparation import Run, sample_size
from nerine.train.validation import resting

__all__ = ["draw_samples"]


def draw_samples(run: Run, step: int) -> list[Path]:
    """Draw every prompt into samples/<step>/; the files, in the order of the prompts. Where each process holds only
    pieces of the denoiser all of them draw, and the first writes."""
    settings = run.settings.samples
    if not settings.prompts or not (run.is_first or run.settings.base.shard):
        return []
    with resting(run.network), _awake(run), run.accelerator.autocast():
        pictures = run.base.draw(
            settings.prompts,
            negative=settings.negative,
            steps=settings.sample_steps,
            guidance=settings.guidance,
            size=sample_size(run.settings, run.base),
            seeds=[settings.sample_seed + number for number in range(len(settings.prompts))],
        )
    if not run.is_first:
        return []
    place = run.settings.output.out / "samples" / f"{step:06d}"
    place.parent.mkdir(parents=True, exist_ok=True)
    names = [f"{number:02d}.png" for number in range(len(pictures))]
    with replacing_folder(place) as folder:
        for name, picture in zip(names, pictures, strict=True):
            picture.save(folder / name)
    return [place / name for name in names]


@contextmanager
def _awake(run: Run) -> Iterator[None]:
    """The parts that rest in the CPU's memory where the others are, for as long as pictures are drawn."""
    resting_parts = [part for part in run.base.encoders if _place(part) != run.device]
    for part in resting_parts:
        part.to(run.device)
    try:
        yield
    finally:
        for part in resting_parts:
            part.to("cpu")


def _place(part: nn.Module) -> torch.device:
    return next(part.parameters()).device
