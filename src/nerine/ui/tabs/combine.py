"""Combine: several adapters as one file, each at its strength."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from nerine.tools.blend import METHODS
from nerine.tools.combine import CombineReport
from nerine.tools.combine import combine as run
from nerine.tools.inspect.text import number, printable
from nerine.tools.pages.marks import Markup
from nerine.ui.bench import DTYPES, Bench, chosen_dtype, devices, number_field, whole
from nerine.ui.jobs import Job
from nerine.ui.panels import facts, grid, notes, stacked
from nerine.ui.saved import readers, saved_facts
from nerine.ui.shelf import MOST, chosen, shelf

__all__ = ["build"]

AUTOMATIC = "automatic"


def build(bench: Bench) -> None:
    """Lay out the tab."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            rows = shelf(bench, "combine", 2)
            with gr.Row():
                method = gr.Dropdown(
                    list(METHODS),
                    value="concat",
                    label="Method",
                    info="concat is exact",
                    elem_id="combine-method",
                    min_width=130,
                )
                rank = number_field("Rank", info="svd, linear, fitted", name="combine-rank")
            out = bench.output("combine", "-combined", rows.files)
            with gr.Accordion("More settings", open=False):
                density = gr.Slider(
                    0.01, 1.0, 0.5, step=0.01, label="Density", info="Share of entries: ties, dare, prune"
                )
                to = gr.Dropdown(
                    [AUTOMATIC, "lora", "full"], value=AUTOMATIC, label="What is no low-rank product becomes"
                )
                base = bench.file("Checkpoint all are for", "combine-base", "Needed for DoRA, OFT, GLoRA, IA3")
                with gr.Row():
                    dtype = gr.Dropdown(list(DTYPES), value="as it is", label="Numbers", min_width=110)
                    device = gr.Dropdown(devices(), value="cpu", label="Compute on", min_width=110)
            buttons = bench.buttons("combine", "Combine")
        with gr.Column(scale=5, min_width=320):
            result = bench.result(
                "combine", "Choose two adapters or more; the file that comes of them adds what they would add together."
            )

    def work(job: Job, *values: Any) -> str:
        how, rank_, place, replace, share, becomes, model, numbers, where = values[2 * MOST :]
        pairs = chosen(bench, values, 2)
        target = bench.folders.writing(place or "", replace)
        weights = bench.optional_file(model, "Checkpoint")
        report = run(
            pairs,
            target,
            method=how,
            rank=whole(rank_, "Rank"),
            density=share,
            to=None if becomes == AUTOMATIC else becomes,
            base=weights,
            dtype=chosen_dtype(numbers),
            device=where,
            force=replace,
            progress=job.progress,
        )
        return stacked(bench.written(target), *_shown(report, readers(target, weights)))

    bench.wire("combine", buttons, [*rows.inputs, method, rank, *out, density, to, base, dtype, device], result, work)


def _shown(report: CombineReport, told: Markup) -> list[Markup]:
    counts = {how: sum(row.method == how for row in report.rows) for how in ("exact", "kept", "fitted", "dropped")}
    became = [(f"layers {how}", count or "", "") for how, count in counts.items()]
    error = [("error", number(report.error), f"{number(report.worst)} at worst")] if counts["fitted"] else []
    read = [
        (f"{at}: {Path(one.file).name}", one.dialect, strength, len(one.rows))
        for at, (one, strength) in enumerate(zip(report.reads, report.strengths, strict=True), 1)
    ]
    rows = [
        (
            row.layer,
            " ".join(str(at + 1) for at in row.files),
            row.before,
            row.after,
            row.rank or "",
            row.method,
            f"{row.error:.2g}" if row.method == "fitted" else "",
            row.note,
        )
        for row in report.rows
    ]
    return [
        facts([*saved_facts(report.written), *became, *error]),
        grid(("file", "dialect", "strength", "layers"), read, "What went in", numbers=(2, 3)),
        told,
        grid(("layer", "of", "was", "is", "rank", "how", "error", "note"), rows, "Layers", numbers=(4, 6)),
        notes(printable(note, 300) for note in (*report.notes, *report.written.notes)),
    ]
