"""Plan: what attaching adapters to a checkpoint would do, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from nerine.algorithms import REGISTRY
from nerine.errors import OptionError
from nerine.model.plan import PlanRow
from nerine.tiny.load import MODEL
from nerine.tools.inspect.places import order_of, spot_of
from nerine.tools.inspect.text import bytes_of
from nerine.tools.planning import PRESETS, CheckpointPlan, algorithm_of, plan_checkpoint
from nerine.ui.bench import Bench, number_field, whole
from nerine.ui.jobs import Job
from nerine.ui.panels import block, facts, grid, notes, stacked, verdict
from nerine.ui.plots import amounts_plot

__all__ = ["build"]

TINY, OWN = "the tiny model inside nerine", "a checkpoint of mine"
UNET = MODEL / "unet"


def build(bench: Bench) -> None:
    """Lay out the tab."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            model = gr.Radio([TINY, OWN], value=TINY, label="Model", elem_id="plan-model")
            with gr.Group(visible=False) as own:
                file = bench.file("Checkpoint", "plan-file", "Names and shapes alone are read", upload=False)
            algorithm = gr.Dropdown(list(REGISTRY), value="lora", label="Algorithm", elem_id="plan-algorithm")
            with gr.Row():
                ranks = number_field("Rank", "16", info="Empty: its default", name="plan-rank")
                preset = gr.Dropdown(
                    list(PRESETS), value="full", label="Layers", info="A preset", elem_id="plan-preset", min_width=130
                )
            dora = gr.Checkbox(label="DoRA around it", value=False, elem_id="plan-dora")
            with gr.Accordion("More settings", open=False):
                settings = gr.Textbox(
                    label="Settings of the algorithm", placeholder="alpha=8, factor=4", max_length=400
                )
                norms = gr.Checkbox(label="Train norms as well", value=False)
            buttons = bench.buttons("plan", "Plan")
        with gr.Column(scale=5, min_width=320):
            result = bench.result(
                "plan", "Choose a model and an algorithm to see what would be trained, and what it takes."
            )
    model.change(
        lambda name: gr.update(visible=name == OWN), [model], [own], show_progress="hidden", api_visibility="private"
    )
    algorithm.change(
        lambda name: gr.update(value="16" if "rank" in REGISTRY[name].__dataclass_fields__ else ""),
        [algorithm],
        [ranks],
        show_progress="hidden",
        api_visibility="private",
    )

    def work(job: Job, which: str, chosen: str, name: str, *values: Any) -> str:
        rank_, preset_, dora_, told, norms_ = values
        path = UNET if which == TINY else bench.folders.reading(chosen or "", "Checkpoint")
        rank = whole(rank_, "Rank")
        what = algorithm_of(name, {**_settings(told), **({} if rank is None else {"rank": str(rank)})}, dora_)
        report = plan_checkpoint(path, what, targets=preset_, train_norm=norms_)
        return _shown(report, "the tiny model" if which == TINY else bench.folders.shown(path), str(what))

    bench.wire("plan", buttons, [model, file, algorithm, ranks, preset, dora, settings, norms], result, work)


def _settings(text: str | None) -> dict[str, str]:
    """{setting: value} of "alpha=8, factor=4".

    Raises:
        OptionError: a piece has no "=".
    """
    found = {}
    for piece in filter(None, (part.strip() for part in (text or "").split(","))):
        key, equals, value = piece.partition("=")
        if not equals or not key.strip():
            raise OptionError(f"Settings: expected alpha=8, factor=4 and so on, found {piece!r}")
        found[key.strip()] = value.strip()
    return found


def _shown(report: CheckpointPlan, name: str, what: str) -> str:
    rows, training = report.plan.rows, report.training_bytes
    cells = [(r.layer, r.kind, " × ".join(map(str, r.shape)), r.algorithm, f"{r.params:,}", r.note) for r in rows]
    left = [(path, why) for path, why in report.plan.skipped.items()]
    return stacked(
        verdict(f"{what} on {name}"),
        facts(
            (
                ("layers", f"{len(rows):,}", f"{len(left):,} left out" if left else ""),
                ("trained values", f"{report.params:,}", f"{report.share:.2%} of {report.plan.base_params:,}"),
                ("file", bytes_of(report.file_bytes), "in fp16"),
                ("training", bytes_of(sum(training.values())), "values, gradients, AdamW; fp32"),
            )
        ),
        block("Trained values by block", amounts_plot(_by_block(rows), "trained values")),
        grid(("layer", "kind", "shape", "algorithm", "values", "note"), cells, "Layers", numbers=(4,)),
        grid(("layer", "why"), left, "Left out"),
        notes(report.notes),
    )


def _by_block(rows: Sequence[PlanRow]) -> list[tuple[str, float]]:
    """Trained values of each block, in the order of the model."""
    found: dict[str, float] = {}
    for row in sorted(rows, key=lambda one: order_of(spot_of(one.layer), one.layer)):
        spot = spot_of(row.layer)
        name = " ".join(part for part in (spot.component, spot.block) if part) or row.layer.partition(".")[0]
        found[name] = found.get(name, 0.0) + row.params
    return list(found.items())
