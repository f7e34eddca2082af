"""`train`: a run from its settings to the files that are left, and the report of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nerine.files.atomic import write_json, write_text
from nerine.tables import listing
from nerine.train.config import to_toml
from nerine.train.loop import Loop, own_randomness
from nerine.train.page import RunSummary, write_report
from nerine.train.preparation import Run, engine, prepare
from nerine.train.resuming import SETTINGS, check_free
from nerine.train.settings import TrainSettings
from nerine.train.watching import Watcher

__all__ = ["TrainReport", "train"]

SMOOTH = 50  # steps that the loss at the end is averaged over


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a run came to. Losses of validation are None where there was none; `best_step` is where it was lowest."""

    out: str
    adapter: tuple[str, ...]
    steps: int
    planned: int
    seconds: float
    loss: float
    validation_before: float | None
    validation: float | None
    best: float | None
    best_step: int | None
    layers: int
    params: int
    pictures: int
    skipped: int
    page: str | None
    notes: tuple[str, ...] = ()

    @property
    def is_finished(self) -> bool:
        """Whether all steps were made."""
        return self.steps == self.planned

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"is_finished": self.is_finished}

    def __str__(self) -> str:
        rows = [
            ("steps", f"{self.steps:,} of {self.planned:,} in {self.seconds:.0f} s"),
            ("trained", f"{self.params:,} values in {self.layers} layers, on {self.pictures} pictures"),
            ("loss", f"{self.loss:.4f} (mean of the last {min(SMOOTH, self.steps)} steps)"),
        ]
        if self.validation is not None and self.validation_before is not None:
            best = f", lowest {self.best:.4f} after step {self.best_step}" if self.best is not None else ""
            rows.append(("held-out loss", f"{self.validation_before:.4f} before, {self.validation:.4f} now{best}"))
        rows += [("adapter", file) for file in self.adapter]
        rows += [("report", self.page)] if self.page else []
        rows += [("skipped", f"{self.skipped} pictures; {self.out}/data.json names them")] if self.skipped else []
        if not self.is_finished:
            rows.append(("to go on", f"nerine train --resume --out {self.out}"))
        return "\n".join([listing(rows), *self.notes])


def train(settings: TrainSettings, *, resume: bool = False, watcher: Watcher | None = None) -> TrainReport:
    """Fine-tune a model as `settings` say; everything is written into the folder `settings.output.out`.

    With `resume` it goes on from the latest checkpoint there, to the same bits as if it had never stopped (on a CPU),
    and from the start where there is none yet. Under `accelerate launch` all processes call this.

    Raises:
        OptionError: settings contradict each other, or (without `resume`) the folder has a run already.
        NerineError: data, base or files are not as they should be.
    """
    watcher = Watcher() if watcher is None else watcher
    if not resume:
        check_free(settings.output.out)
    accelerator = engine(settings)
    with own_randomness(accelerator.device):
        return _train(settings, resume, watcher, accelerator)


def _train(settings: TrainSettings, resume: bool, watcher: Watcher, accelerator: Any) -> TrainReport:
    out = settings.output.out
    run = prepare(settings, watcher, accelerator)
    loop = Loop(run, watcher)
    first = loop.resume() if resume else 0
    if run.is_first:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / SETTINGS, to_toml(settings))
        write_json(out / "data.json", run.data.to_dict())
    accelerator.wait_for_everyone()
    if settings.output.trackers:
        accelerator.init_trackers(settings.output.project, config=_flat(settings))
    watcher.begins(first, run.steps, describe(run))
    is_finished = loop.go()
    report = _finish(run, loop, is_finished)
    accelerator.end_training()
    return report


def describe(run: Run) -> str:
    """One line about what is trained on what."""
    count = sum(p.numel() for p in run.network.parameters())
    kinds = sorted({str(adapter.algorithm) for *_, adapter in run.network.adapters()})
    what = kinds[0] if len(kinds) == 1 else f"{len(kinds)} kinds of adapters"
    return f"{what} on {len(run.network)} layers of {run.settings.base.base} ({count:,} values)"


def _finish(run: Run, loop: Loop, is_finished: bool) -> TrainReport:
    """The adapter where the user looks for it, the page, and the report; every process gathers, the first writes."""
    out, name = run.settings.output.out, run.settings.output.name
    files: list[Path] = []
    if is_finished and (run.is_first or run.settings.base.shard):
        files = loop.write_adapters(out, name)
    page, notes = _write_page(run, loop, files) if run.is_first else (None, ())
    return _report(run, loop, files, page, notes)


def _write_page(run: Run, loop: Loop, files: list[Path]) -> tuple[str, tuple[str, ...]]:
    summary = RunSummary(
        settings=run.settings,
        history=loop.history,
        folder=run.settings.output.out,
        adapter=files[0] if files else None,
        data=run.data.to_dict(),
        steps=run.steps,
        seconds=loop.seconds,
        layers=len(run.network),
        params=sum(p.numel() for p in run.network.parameters()),
        base=run.settings.base.base,
        notes=tuple(run.network.report.notes),
    )
    page, notes = write_report(summary)
    return str(page), notes


def _report(run: Run, loop: Loop, files: list[Path], page: str | None, notes: tuple[str, ...]) -> TrainReport:
    losses = loop.history.losses() if run.is_first else []
    tried: list[tuple[int, float]] = loop.history.validations() if run.is_first else []
    last = [loss for _, loss in losses[-SMOOTH:]]
    later = [(loss, step) for step, loss in tried if step]
    best = min(later, default=None)
    return TrainReport(
        out=str(run.settings.output.out),
        adapter=tuple(map(str, files)),
        steps=loop.done,
        planned=run.steps,
        seconds=loop.seconds,
        loss=sum(last) / len(last) if last else float("nan"),
        validation_before=tried[0][1] if tried and tried[0][0] == 0 else None,
        validation=tried[-1][1] if tried else None,
        best=best[0] if best else None,
        best_step=best[1] if best else None,
        layers=len(run.network),
        params=sum(p.numel() for p in run.network.parameters()),
        pictures=run.data.pictures,
        skipped=len(run.data.skipped),
        page=page,
        notes=notes,
    )


def _flat(settings: TrainSettings) -> Mapping[str, Any]:
    """The settings as trackers take them: one level, plain values."""
    from nerine.train.settings import keys

    found = {one.name: getattr(getattr(settings, one.section), one.name) for one in keys()}
    return {name: value if isinstance(value, bool | int | float) else str(value) for name, value in found.items()}
