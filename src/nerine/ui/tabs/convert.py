"""Convert: an adapter for another program, as another algorithm, or both; and which programs read what comes of it."""

from __future__ import annotations

from typing import Any

import gradio as gr

from nerine.algorithms import REGISTRY
from nerine.errors import OptionError
from nerine.files.dialects import DIALECTS
from nerine.tools.convert import ConvertReport
from nerine.tools.convert import convert as run
from nerine.tools.inspect.text import number, printable
from nerine.tools.pages.marks import Markup
from nerine.ui.bench import DTYPES, Bench, chosen_dtype, decimal, devices, number_field, whole
from nerine.ui.jobs import Job
from nerine.ui.panels import facts, grid, notes, stacked
from nerine.ui.saved import readers, saved_facts

__all__ = ["build"]

KEEP = "as it is"


def build(bench: Bench) -> None:
    """Lay out the tab."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            file = bench.file("Adapter", "convert-file")
            with gr.Row():
                dialect = gr.Dropdown(
                    [KEEP, *DIALECTS], value=KEEP, label="Dialect", elem_id="convert-dialect", min_width=130
                )
                to = gr.Dropdown([KEEP, *REGISTRY], value=KEEP, label="Algorithm", elem_id="convert-to", min_width=130)
            out = bench.output("convert", "-converted", [file])
            with gr.Accordion("More settings", open=False):
                with gr.Row():
                    rank = number_field("Rank", info="Where it is fitted", name="convert-rank")
                    tol = number_field("Tolerance", info="For lora: the error to keep")
                dora = gr.Checkbox(label="Leave DoRA around it", value=True)
                base = bench.file("Checkpoint it is for", "convert-base", "Where weights are needed")
                with gr.Row():
                    dtype = gr.Dropdown(list(DTYPES), value=KEEP, label="Numbers", min_width=110)
                    device = gr.Dropdown(devices(), value="cpu", label="Compute on", min_width=110)
            buttons = bench.buttons("convert", "Convert")
        with gr.Column(scale=5, min_width=320):
            result = bench.result(
                "convert", "Choose an adapter, and what it is to become: for another program, or another algorithm."
            )

    def work(job: Job, chosen: str, kind: str, algorithm: str, place: str, replace: bool, *more: Any) -> str:
        fitted, tolerance, around, model, numbers, where = more
        if kind == KEEP and algorithm == KEEP:
            raise OptionError("choose a dialect, an algorithm, or both: as they are now there is nothing to convert")
        path = bench.folders.reading(chosen or "", "Adapter")
        target = bench.folders.writing(place or "", replace)
        options: dict[str, Any] = {
            "rank": whole(fitted, "Rank"),
            "tol": decimal(tolerance, "Tolerance"),
            "dora": around,
        }
        weights = bench.optional_file(model, "Checkpoint")
        report = run(
            path,
            target,
            dialect=None if kind == KEEP else kind,
            to=None if algorithm == KEEP else algorithm,
            base=weights,
            dtype=chosen_dtype(numbers),
            device=where,
            force=replace,
            progress=job.progress,
            **options,
        )
        return stacked(bench.written(target), *_shown(report, readers(target, weights)))

    bench.wire("convert", buttons, [file, dialect, to, *out, rank, tol, dora, base, dtype, device], result, work)


def _shown(report: ConvertReport, told: Markup) -> list[Markup]:
    counts = {how: sum(row.method == how for row in report.rows) for how in ("exact", "fitted", "kept")}
    became = [("layers " + how, count or "", "") for how, count in counts.items()]
    error = [("error", number(report.error), f"{number(report.worst)} at worst")] if counts["fitted"] else []
    rows = [
        (row.layer, row.before, row.rank_before or "", row.after, row.rank or "", row.method, _error(row), row.note)
        for row in report.rows
    ]
    head = ("layer", "was", "rank", "is", "rank", "how", "error", "note")
    unused = [(key, why) for key, why in report.read.unmatched.items()]
    return [
        facts([*saved_facts(report.written), *became, *error]),
        told,
        grid(head, rows, "Layers", numbers=(2, 4, 6)),
        grid(("tensor", "why it was not used"), unused, "Not used"),
        notes(printable(note, 300) for note in (*report.read.notes, *report.written.notes)),
    ]


def _error(row: Any) -> str:
    return "" if row.method == "kept" else f"{row.error:.2g}"
