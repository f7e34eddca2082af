"""Inspect: what is in an adapter file, layer by layer, and what looks wrong. A dropped file is looked at at once."""

from __future__ import annotations

import gradio as gr

from nerine.tools.inspect import InspectReport
from nerine.tools.inspect import inspect as look
from nerine.tools.inspect.text import bytes_of, counted, number, printable, spread
from nerine.tools.pages import page
from nerine.tools.pages.marks import Markup, mark
from nerine.ui.bench import SETTLED, Bench, devices
from nerine.ui.jobs import Job
from nerine.ui.panels import block, facts, grid, linked, notes, stacked, verdict
from nerine.ui.plots import layers_plot

__all__ = ["build"]


def build(bench: Bench) -> None:
    """Lay out the tab."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            dropped = gr.File(
                label="Drop an adapter here", file_types=[".safetensors"], height=164, elem_id="inspect-drop"
            )
            file = bench.file("or pick one of your folders", "inspect-file", upload=False)
            with gr.Accordion("More settings", open=False, elem_id="inspect-more"):
                base = bench.file(
                    "Checkpoint it is for", "inspect-base", "Changes are then measured against its weights"
                )
                device = gr.Dropdown(devices(), value="cpu", label="Compute on")
            buttons = bench.buttons("inspect", "Inspect")
        with gr.Column(scale=5, min_width=320):
            result = bench.result("inspect", "Choose an adapter file to see what is in it and which layers look wrong.")
    taken = dropped.upload(lambda path: (bench.received(path), None), [dropped], [file, dropped], **SETTLED)

    def work(job: Job, chosen: str | None, model: str | None, where: str) -> str:
        path = bench.folders.reading(chosen or "", "File")
        weights = bench.optional_file(model, "Checkpoint")
        report = look(path, base=weights, device=where, progress=job.progress)
        return _shown(bench, report, bench.folders.shown(path))

    bench.wire("inspect", buttons, [file, base, device], result, work, also=[taken.success])


def _shown(bench: Bench, report: InspectReport, name: str) -> str:
    """The report as markup."""
    whole = page(report)
    stem = name.rsplit("/", 1)[-1].removesuffix(".safetensors")
    found = {finding.layer for finding in report.findings}
    good = verdict(f"{name}: no layer looks suspicious") if report.healthy else Markup()
    bad = verdict(f"{name}: {len(found)} of {len(report.rows)} layers look suspicious", False) if found else Markup()
    why = [(finding.layer, finding.problem, finding.reason) for finding in report.findings]
    frame = mark("iframe", srcdoc="", sandbox="allow-scripts", title="The whole report", class_="ne-frame")
    filled = Markup(frame.replace('srcdoc=""', f'srcdoc="{_quoted(whole)}"', 1))
    return stacked(
        good,
        bad,
        grid(("layer", "problem", "why"), why, "Suspicious layers"),
        _facts(report),
        block("Size of the change, layer by layer", layers_plot(report)),
        _blocks(report),
        _training(report),
        notes(printable(note, 300) for note in report.notes),
        block(
            "The whole report", linked(bench.downloads.add(f"{stem}.html", whole), "Download as one HTML file"), filled
        ),
    )


def _quoted(text: str) -> str:
    """A page as the value of an attribute."""
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def _facts(report: InspectReport) -> Markup:
    rank, _, ranks = spread(report.ranks).partition(",")
    alpha, _, alphas = spread(report.alphas).partition(",")
    algorithms = list(report.algorithms)
    return facts(
        (
            ("layers", len(report.rows), counted(report.components) if len(report.components) > 1 else ""),
            ("algorithm", ", ".join(algorithms[:2]), f"and {len(algorithms) - 2} more" if len(algorithms) > 2 else ""),
            ("rank", rank, ranks.strip()),
            ("alpha", alpha, alphas.strip()),
            ("trained values", f"{report.parameters:,}", ""),
            ("size", bytes_of(report.bytes), report.container),
            ("dialect", report.dialect, ""),
            ("written by", report.written_by.partition(",")[0], ""),
        )
    )


def _blocks(report: InspectReport) -> Markup:
    head = ("part", "block", "layers", "norm", "of weight", "effective rank")
    rows = [
        (b.component, b.name, b.layers, number(b.norm), number(b.relative), number(b.effective_rank))
        for b in report.blocks
    ]
    return grid(head, rows, "Blocks, medians over their layers", numbers=(2, 3, 4, 5))


def _training(report: InspectReport) -> Markup:
    rows = [
        (group, name, text) for group, told in report.training.groups.items() for name, text in list(told.items())[:20]
    ]
    rows += [
        ("folders", one.name, f"{one.images} pictures, {one.repeats} times") for one in report.training.datasets[:20]
    ]
    if report.training.triggers:
        rows.append(("captions", "trigger words", ", ".join(report.training.triggers[:20])))
    return grid(("", "setting", "value"), rows, "Training, as the file tells")
