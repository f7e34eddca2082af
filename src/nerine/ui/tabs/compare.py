"""Compare: how far two adapter files are apart, whatever their dialects and algorithms."""

from __future__ import annotations

import gradio as gr

from nerine.tools.compare import CompareReport
from nerine.tools.compare import compare as look
from nerine.tools.inspect.text import number, printable
from nerine.tools.pages.marks import Markup
from nerine.ui.bench import Bench, devices
from nerine.ui.jobs import Job
from nerine.ui.panels import block, facts, grid, notes, stacked, verdict
from nerine.ui.plots import distances_plot

__all__ = ["build"]

SAME = {
    "files": "The two files are the same, byte for byte.",
    "tensors": "All tensors are the same, bit for bit; the metadata differs.",
    "numbers": "All layers change the same numbers by the same amounts.",
}


def build(bench: Bench) -> None:
    """Lay out the tab."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            a = bench.file("First adapter (A)", "compare-a")
            b = bench.file("Second adapter (B)", "compare-b", "Of any dialect and algorithm")
            with gr.Accordion("More settings", open=False):
                base = bench.file(
                    "Checkpoint they are for", "compare-base", "Needed for DoRA, rotations and multipliers"
                )
                device = gr.Dropdown(devices(), value="cpu", label="Compute on")
            buttons = bench.buttons("compare", "Compare")
        with gr.Column(scale=5, min_width=320):
            result = bench.result("compare", "Choose two adapter files to see how far their changes are apart.")

    def work(job: Job, first: str | None, second: str | None, model: str | None, where: str) -> str:
        paths = (
            bench.folders.reading(first or "", "First adapter"),
            bench.folders.reading(second or "", "Second adapter"),
        )
        weights = bench.optional_file(model, "Checkpoint")
        report = look(*paths, base=weights, device=where, progress=job.progress)
        return _shown(report, [bench.folders.shown(path) for path in paths])

    bench.wire("compare", buttons, [a, b, base, device], result, work)


def _shown(report: CompareReport, names: list[str]) -> str:
    whole = report.together
    if report.identical:
        head = verdict(SAME[report.identical])
    else:
        known = "" if whole.distance is None else f"together they are {number(whole.distance)} apart (0 is the same)"
        head = verdict(f"A is {names[0]}, B is {names[1]}", more=known)
    alone = [(name, path) for name, paths in (("A", report.only_a), ("B", report.only_b)) for path in paths]
    return stacked(
        head,
        facts(
            (
                ("layers in both", len(report.rows), f"matched by {report.how}"),
                ("distance", number(whole.distance), "|A − B| / max(|A|, |B|)"),
                ("cosine", _share(whole.cosine), "1: the same direction"),
                ("|B| / |A|", number(whole.ratio), ""),
                ("in one alone", len(alone) or "", ""),
            )
        ),
        block("Distance, layer by layer", distances_plot(report)),
        _layers(report),
        grid(("only in", "layer"), alone, "In one file alone"),
        notes(printable(note, 300) for note in report.notes),
    )


def _layers(report: CompareReport) -> Markup:
    rows = sorted(report.rows, key=lambda row: -(row.distance or 0.0))
    head = ("layer", "cosine", "|B|/|A|", "distance", "outputs", "inputs", "note")
    cells = [
        (
            row.layer,
            _share(row.cosine),
            number(row.ratio),
            number(row.distance),
            _share(row.overlap_out),
            _share(row.overlap_in),
            row.why,
        )
        for row in rows
    ]
    return grid(head, cells, "Layers, those that differ most first", numbers=(1, 2, 3, 4, 5))


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
