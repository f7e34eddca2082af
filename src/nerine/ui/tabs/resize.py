"""Resize: the adapters of a file with fewer ranks, by a number, a share of the energy, or the size of the file."""

from __future__ import annotations

from typing import Any

import gradio as gr

from nerine.errors import OptionError
from nerine.tools.inspect.text import bytes_of, number, printable
from nerine.tools.pages.marks import Markup
from nerine.tools.resize import ResizeReport
from nerine.tools.resize import resize as run
from nerine.ui.bench import DTYPES, Bench, chosen_dtype, decimal, devices, number_field, whole
from nerine.ui.jobs import Job
from nerine.ui.panels import facts, grid, notes, stacked
from nerine.ui.saved import readers

__all__ = ["build"]

RULES = {"Rank": "rank", "Energy": "energy", "File size": "size"}


def build(bench: Bench) -> None:
    """Lay out the tab."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            file = bench.file("Adapter", "resize-file")
            rule = gr.Radio(list(RULES), value="Rank", label="Cut down to", elem_id="resize-rule")
            rank = number_field("Rank", "8", info="That every layer keeps", name="resize-rank")
            energy = gr.Slider(
                0.5, 1.0, 0.95, step=0.005, label="Energy", info="Share of Σσ² that every layer keeps", visible=False
            )
            size = number_field("Size in MB", "20", info="Of the file, shared out where it counts most", visible=False)
            out = bench.output("resize", "-smaller", [file])
            with gr.Accordion("More settings", open=False):
                conv = number_field("Rank of convolutions", info="The same if empty")
                base = bench.file("Checkpoint it is for", "resize-base", "DoRA's magnitudes are then fitted anew")
                with gr.Row():
                    dtype = gr.Dropdown(list(DTYPES), value="as it is", label="Numbers", min_width=110)
                    device = gr.Dropdown(devices(), value="cpu", label="Compute on", min_width=110)
            buttons = bench.buttons("resize", "Resize")
        with gr.Column(scale=5, min_width=320):
            result = bench.result(
                "resize", "Choose an adapter and how small it is to be; every layer keeps the best of its ranks."
            )

    def switch(name: str) -> list[Any]:
        return [gr.update(visible=RULES[name] == key) for key in ("rank", "energy", "size")]

    rule.change(switch, [rule], [rank, energy, size], show_progress="hidden", api_visibility="private")

    def work(job: Job, chosen: str, *values: Any) -> str:
        rule_, rank_, energy_, size_, place, replace, conv_, model, numbers, where = values
        path = bench.folders.reading(chosen or "", "Adapter")
        target = bench.folders.writing(place or "", replace)
        weights = bench.optional_file(model, "Checkpoint")
        report = run(
            path,
            target,
            **_how(RULES[rule_], rank_, energy_, size_),
            conv_rank=whole(conv_, "Rank of convolutions") if RULES[rule_] == "rank" else None,
            base=weights,
            dtype=chosen_dtype(numbers),
            device=where,
            force=replace,
            progress=job.progress,
        )
        return stacked(bench.written(target), *_shown(report, readers(target, weights)))

    inputs = [file, rule, rank, energy, size, *out, conv, base, dtype, device]
    bench.wire("resize", buttons, inputs, result, work)


def _how(rule: str, rank: str, energy: float, size: str) -> dict[str, Any]:
    """The one setting of the tool that the rule stands for."""
    if rule == "energy":
        return {"energy": energy}
    value = whole(rank, "Rank") if rule == "rank" else decimal(size, "Size in MB")
    if value is None:
        raise OptionError(f"{rule}: give a number")
    return {rule: int(value) if rule == "rank" else int(value * 10**6)}


def _shown(report: ResizeReport, told: Markup) -> list[Markup]:
    before, after = report.ranks
    rows = [
        (row.layer, row.before, row.rank_before or "", row.rank or "", *_loss(row), row.note) for row in report.rows
    ]
    head = ("layer", "algorithm", "rank before", "rank now", "error", "energy kept", "note")
    return [
        facts(
            (
                ("size", bytes_of(report.written.bytes), f"was {bytes_of(report.bytes_before)}"),
                ("ranks in all", f"{after:,}", f"were {before:,}"),
                ("energy kept", f"{1 - report.error**2:.2%}", ""),
                ("error", number(report.error), f"{number(report.worst)} at worst"),
                ("layers", report.written.layers, report.written.dialect),
            )
        ),
        grid(head, rows, "Layers", numbers=(2, 3, 4, 5)),
        told,
        notes(printable(note, 300) for note in (*report.read.notes, *report.written.notes)),
    ]


def _loss(row: Any) -> tuple[str, str]:
    is_cut = row.rank is not None and row.rank != row.rank_before
    return (f"{row.error:.2g}", f"{row.energy:.1%}") if is_cut else ("", "")
