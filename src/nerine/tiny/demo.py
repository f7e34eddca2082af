"""The demo: the tiny model learns a style from pictures of the digits 0 to 4, and draws 5 to 9 in it.

It does what a user would do with a model of any size: attach, train, save, reload, merge; and it measures the promise
of the library on the way. It prints nothing: progress goes to a callback, results into a `DemoReport`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nerine.algorithms import REGISTRY, Algorithm, DoRA
from nerine.api import load, save
from nerine.errors import FormatError, OptionError, nearest
from nerine.model.fitting import attach
from nerine.model.network import Network
from nerine.tables import table
from nerine.tiny.data import SEEN, UNSEEN, Split, prompt, style_set
from nerine.tiny.judge import Judge
from nerine.tiny.load import load_pipeline
from nerine.tiny.losses import denoising_loss, drop_prompts, held_out_loss
from nerine.tiny.sheet import grid

if TYPE_CHECKING:
    from nerine.tiny.pipeline import TinyPipeline

__all__ = ["DemoReport", "DemoSettings", "Watch", "run_demo"]

Progress = Callable[[int, float], None]  # step (from 1), loss

ALGORITHMS: dict[str, dict[str, Any]] = {  # settings that give about 20,000 trained values each
    "lora": {"rank": 4},
    "loha": {"rank": 3},
    "lokr": {"rank": 4, "factor": 4},
}
SAMPLE_SEED, SAMPLES = 5, 10  # samples drawn for each digit


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demo trains and how: `lr` for AdamW, `batch` in pictures, `style` "neon" or "paper"; `rank` None is the
    one of the demo for that algorithm."""

    algo: str = "lokr"
    rank: int | None = None
    dora: bool = True
    steps: int = 160
    seed: int = 0
    style: str = "neon"
    lr: float = 4e-3
    batch: int = 32

    def __post_init__(self) -> None:
        if self.algo not in ALGORITHMS:
            raise OptionError(f"--algo {self.algo!r} is not known here. {nearest(self.algo, ALGORITHMS)}")
        if self.steps < 1 or self.batch < 1:
            raise OptionError(f"steps and batch must be at least 1, got {self.steps} and {self.batch}")

    @property
    def algorithm(self) -> Algorithm:
        chosen = {} if self.rank is None else {"rank": self.rank}
        inner = REGISTRY[self.algo](**{**ALGORITHMS[self.algo], **chosen})
        return DoRA(inner) if self.dora else inner

    @property
    def stem(self) -> str:
        """How the files of the results are called, without an ending."""
        return f"{self.style}-{'dora-' if self.dora else ''}{self.algo}"


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Who looks on while the demo trains: `drawn` gets the step and pictures `[10, 3, 16, 16]` in [-1, 1] (two of each
    digit from 5 to 9) before the first step and every `every` steps; `enough` is asked after each step, and True ends
    the training there. Looking on changes no number of the result.
    """

    every: int = 0
    drawn: Callable[[int, Tensor], None] | None = None
    enough: Callable[[], bool] | None = None


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """What was measured. Losses are denoising losses on held-out digits in the style; accuracies are in [0, 1];
    the differences are the largest between outputs of the trained model and those of the other (outputs are about 1).
    """

    algorithm: str
    layers: int
    params: int
    steps: int
    seconds: float
    loss_before: float
    loss_after: float
    accuracy_seen: float
    accuracy_unseen: float
    real_accuracy: float
    difference_reloaded: float
    difference_merged: float
    adapter: str
    picture: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            ("trained", f"{self.algorithm}: {self.layers} layers, {self.params:,} values"),
            ("time", f"{self.steps} steps in {self.seconds:.0f} s, {self.seconds / self.steps:.3f} s a step"),
            (
                "held-out loss",
                f"{self.loss_before:.3f} before, {self.loss_after:.3f} after (digits 5 to 9 in the style)",
            ),
            ("read as asked", f"{self.accuracy_seen:.0%} of digits 0 to 4, {self.accuracy_unseen:.0%} of 5 to 9"),
            ("", f"(the judge reads {self.real_accuracy:.1%} of real held-out digits)"),
            ("trained = reloaded", f"largest difference {self.difference_reloaded:.1e}"),
            ("trained = merged", f"largest difference {self.difference_merged:.1e}"),
            ("adapter", self.adapter),
            ("picture", self.picture),
        ]
        return table(("", "result"), rows)


def run_demo(
    settings: DemoSettings, out: str | Path, progress: Progress | None = None, watch: Watch | None = None
) -> DemoReport:
    """Run the demo and write the adapter and a picture into the folder `out`.

    Raises:
        OptionError: an unknown algorithm or style.
        MissingExtra: diffusers, transformers or Pillow are not installed.
        FormatError: `out` is a file.
    """
    folder = _folder(out)
    pipeline, data, judge = load_pipeline(), style_set(settings.style), Judge()
    with torch.no_grad():
        held_out = pipeline.encode(data.held_out.prompts)
    before = held_out_loss(pipeline.unet, held_out, data.held_out.pictures)
    shown = [prompt(digit, settings.style) for digit in UNSEEN for _ in range(2)]
    rows = {"base": _sample(pipeline, shown)}
    watch = watch or Watch()
    if watch.drawn is not None:
        watch.drawn(0, rows["base"])

    network = attach(pipeline.unet, settings.algorithm, generator=torch.Generator().manual_seed(settings.seed))
    look = _Look(watch, lambda: _sample(pipeline, shown))
    steps, seconds = _train(pipeline, network, settings, data.train, progress, look)
    adapter = folder / f"{settings.stem}.safetensors"
    save(network, adapter, metadata={"nerine_demo": f"seed {settings.seed}, {steps} steps"})

    reloaded, merged = _compare(pipeline.unet, adapter, held_out[:32], data.held_out.pictures[:32])
    digits = torch.tensor([*SEEN, *UNSEEN] * SAMPLES)
    drawn = _sample(pipeline, [prompt(int(digit), settings.style) for digit in digits])
    right = judge.read(drawn, settings.style) == digits
    rows["adapter"] = _sample(pipeline, shown)
    rows["target"] = _first_two(data.held_out.pictures, data.held_out.digits)
    picture = folder / f"{adapter.stem}.png"
    grid(rows, shown, picture, f"{settings.algorithm}, {steps} steps. It was trained on 0 to 4 only.")
    return DemoReport(
        algorithm=str(settings.algorithm),
        layers=len(network),
        params=sum(p.numel() for p in network.parameters()),
        steps=steps,
        seconds=seconds,
        loss_before=before,
        loss_after=held_out_loss(pipeline.unet, held_out, data.held_out.pictures),
        accuracy_seen=float(right[digits < 5].double().mean()),
        accuracy_unseen=float(right[digits >= 5].double().mean()),
        real_accuracy=judge.real_accuracy,
        difference_reloaded=reloaded,
        difference_merged=merged,
        adapter=str(adapter),
        picture=str(picture),
    )


def _first_two(pictures: Tensor, digits: Tensor) -> Tensor:
    """Two real pictures of each unseen digit."""
    chosen = [index for digit in UNSEEN for index in (digits == digit).nonzero()[:2, 0].tolist()]
    return pictures[chosen]


def _folder(out: str | Path) -> Path:
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise FormatError(f"{folder}: expected a folder for the results, found a file; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _sample(pipeline: TinyPipeline, prompts: Sequence[str]) -> Tensor:
    """Pictures `[n, 3, 16, 16]` in [-1, 1] for the prompts, always from the same noise."""
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    pictures: Tensor = pipeline(list(prompts), generator=generator, output_type="latent").images
    return pictures


class _Look:
    """A `Watch` between the steps: `draw` makes the pictures that it is shown."""

    def __init__(self, watch: Watch, draw: Callable[[], Tensor]) -> None:
        self.watch, self.draw = watch, draw

    def after(self, step: int, unet: torch.nn.Module) -> float:
        """Show what the model draws after that step, if it is time; returns the seconds that it took."""
        watch, start = self.watch, time.monotonic()
        if watch.drawn is None or watch.every < 1 or step % watch.every:
            return 0.0
        unet.eval()
        watch.drawn(step, self.draw())
        unet.train()
        return time.monotonic() - start

    @property
    def has_enough(self) -> bool:
        return self.watch.enough is not None and self.watch.enough()


def _train(
    pipeline: TinyPipeline,
    network: Network,
    settings: DemoSettings,
    data: Split,
    progress: Progress | None,
    look: _Look,
) -> tuple[int, float]:
    """Train the adapters; returns the steps that were made, and the seconds they took."""
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        states, empty = pipeline.encode(data.prompts), pipeline.encode([""])
    optimizer = torch.optim.AdamW(network.param_groups(settings.lr), weight_decay=0.0)
    warmup = max(1, min(20, settings.steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.03, 1 - step / settings.steps))
    )
    pipeline.unet.train()
    start, looked, done = time.monotonic(), 0.0, 0
    for step in range(settings.steps):
        chosen = torch.randint(len(data), (settings.batch,), generator=generator)
        text = drop_prompts(states[chosen], empty, 0.1, generator)
        loss = denoising_loss(pipeline.unet, text, data.pictures[chosen], generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, float(loss.detach()))
        done = step + 1
        looked += look.after(done, pipeline.unet)
        if look.has_enough:
            break
    pipeline.unet.eval()
    return done, time.monotonic() - start - looked


@torch.no_grad()
def _compare(trained: torch.nn.Module, adapter: Path, text: Tensor, pictures: Tensor) -> tuple[float, float]:
    """Largest differences of outputs: trained and reloaded, trained and merged."""
    time_ = torch.linspace(50.0, 950.0, len(pictures))

    def run(unet: torch.nn.Module) -> Tensor:
        output: Tensor = unet(pictures, time_, encoder_hidden_states=text, return_dict=False)[0]
        return output

    fresh = load_pipeline().unet
    network = load(fresh, adapter, strict=True)
    expected, reloaded = run(trained), run(fresh)
    network.merge()
    return float((reloaded - expected).abs().max()), float((run(fresh) - expected).abs().max())
