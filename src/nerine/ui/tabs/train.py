"""Train the demo: the tiny model inside nerine learns a style, with the loss and the pictures to watch meanwhile."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import gradio as gr
from torch import Tensor

from nerine.errors import OptionError
from nerine.tiny.demo import ALGORITHMS, DemoReport, DemoSettings, Watch, run_demo
from nerine.tiny.styles import STYLES
from nerine.tools.pages.marks import Markup, joined, mark
from nerine.ui.bench import Bench, number_field, whole
from nerine.ui.jobs import Job
from nerine.ui.panels import block, facts, stacked, verdict
from nerine.ui.plots import embedded, loss_plot, strip

__all__ = ["build"]

PAUSE = 0.6  # seconds between two pictures of the loss
ABOUT = "It is trained on handwritten digits 0 to 4 in a style, and draws 5 to 9 in it, which it never saw that way."


def build(bench: Bench) -> None:
    """Lay out the tab."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            with gr.Row():
                algo = gr.Dropdown(
                    list(ALGORITHMS), value="lokr", label="Algorithm", elem_id="train-algo", min_width=110
                )
                rank = number_field("Rank", info="Empty: its default", name="train-rank")
            dora = gr.Checkbox(label="DoRA around it", value=True, elem_id="train-dora")
            style = gr.Radio(
                [name for name in STYLES if name != "plain"], value="neon", label="Style", elem_id="train-style"
            )
            steps = gr.Slider(10, 400, 160, step=10, label="Steps", elem_id="train-steps")
            every = gr.Slider(5, 100, 20, step=5, label="Pictures every", elem_id="train-every")
            folder = gr.Textbox(
                "nerine-demo",
                label="Write into the folder",
                info=f"In {bench.folders.roots[0]}",
                elem_id="train-out",
                max_length=4096,
            )
            replace = gr.Checkbox(label="Replace an earlier run", value=False, elem_id="train-replace")
            buttons = bench.buttons("train", "Train", "Stop here")
        with gr.Column(scale=5, min_width=320):
            result = bench.result(
                "train", f"Train the tiny model inside nerine, in a minute or two on this machine. {ABOUT}"
            )

    def work(job: Job, name: str, rank_: Any, *values: Any) -> str:
        dora_, style_, steps_, every_, place, again = values
        settings = DemoSettings(algo=name, rank=whole(rank_, "Rank"), dora=dora_, steps=int(steps_), style=style_)
        target = _target(bench, place, settings, again)
        live = _Live(job, settings.steps)
        watch = Watch(every=int(every_), drawn=live.drawn, enough=job.is_stopped)
        job.progress(0, settings.steps, "opening the model, drawing the first pictures")
        report = run_demo(settings, target, live.stepped, watch)
        job.progress(report.steps, report.steps)
        return _shown(bench, report, live)

    bench.wire("train", buttons, [algo, rank, dora, style, steps, every, folder, replace], result, work)


def _target(bench: Bench, place: str, settings: DemoSettings, again: bool) -> Path:
    """The folder to write into.

    Raises:
        OptionError: it lies outside, or holds these results already and they are not to be replaced.
    """
    target = bench.folders.writing(place or "", again, folder=True)
    for name in (f"{settings.stem}.safetensors", f"{settings.stem}.png"):
        file = target / name
        if file.is_symlink():
            raise OptionError(f"{bench.folders.shown(file)} is a link; choose another folder")
        if file.exists() and not again:
            raise OptionError(f"{bench.folders.shown(file)} is there already; choose another folder, or tick Replace")
    return target


class _Live:
    """What there is to see of a training so far."""

    def __init__(self, job: Job, steps: int) -> None:
        self.job, self.steps = job, steps
        self.losses: list[float] = []
        self.rows: list[Markup] = []
        self._shown = 0.0

    def stepped(self, step: int, loss: float) -> None:
        """The callback of each step."""
        self.losses.append(loss)
        self.job.progress(step, self.steps, f"loss {loss:.3f}" if step < self.steps else "measuring what came of it")
        if time.monotonic() - self._shown > PAUSE or step == self.steps:
            self._show()

    def drawn(self, step: int, pictures: Tensor) -> None:
        """The callback of the pictures."""
        label = f"step {step}" if step else "before"
        self.rows.append(mark("figure", mark("figcaption", label), strip(pictures)))
        self._show()

    @property
    def markup(self) -> Markup:
        film = mark("div", joined(reversed(self.rows)), class_="ne-film")
        return stacked(
            block("Loss", loss_plot(self.losses, self.steps)),
            block("What it draws when asked for 5 to 9, the latest first", film),
        )

    def _show(self) -> None:
        self._shown = time.monotonic()
        self.job.show(self.markup)


def _shown(bench: Bench, report: DemoReport, live: _Live) -> str:
    """The report as markup."""
    merged = report.difference_merged
    return stacked(
        bench.written(Path(report.adapter)),
        verdict("trained = merged", merged < 1e-3, f"the outputs differ by {merged:.1e} at most (they are about 1)"),
        facts(
            (
                ("held-out loss", f"{report.loss_after:.3f}", f"{report.loss_before:.3f} before"),
                ("read as asked, 5 to 9", f"{report.accuracy_unseen:.0%}", f"0 to 4: {report.accuracy_seen:.0%}"),
                ("trained = reloaded", f"{report.difference_reloaded:.1e}", "largest difference"),
                ("trained = merged", f"{merged:.1e}", "largest difference"),
                ("trained values", f"{report.params:,}", f"in {report.layers} layers"),
                (
                    "time",
                    f"{report.seconds:.0f} s",
                    f"{report.steps} steps, {report.seconds / report.steps:.2f} s each",
                ),
            )
        ),
        _sheet(Path(report.picture)),
        live.markup,
    )


def _sheet(picture: Path) -> Markup:
    """The picture that the demo wrote: base, adapter, and what it was to be."""
    return block("Before, after, and the real ones", embedded(picture, "Digits 5 to 9: base, adapter, target"))
