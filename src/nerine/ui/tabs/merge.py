"""Merge: adapters into a checkpoint, tensor by tensor, each at its strength."""

from __future__ import annotations

from typing import Any

import gradio as gr

from nerine.tools.inspect.text import bytes_of, printable
from nerine.tools.merge import MergeReport, Verified
from nerine.tools.merge import merge as run
from nerine.tools.pages.marks import Markup
from nerine.ui.bench import DTYPES, Bench, chosen_dtype, devices, number_field, whole
from nerine.ui.jobs import Job
from nerine.ui.panels import facts, grid, notes, stacked, verdict
from nerine.ui.shelf import MOST, chosen, shelf

__all__ = ["build"]


def build(bench: Bench) -> None:
    """Lay out the tab."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            base = bench.file("Checkpoint", "merge-base", "A .safetensors file, an index, or a folder", upload=False)
            rows = shelf(bench, "merge", 1)
            out = bench.output("merge", "-merged", [base])
            with gr.Accordion("More settings", open=False, elem_id="merge-more"):
                with gr.Row():
                    dtype = gr.Dropdown(
                        list(DTYPES), value="as it is", label="Numbers", elem_id="merge-dtype", min_width=110
                    )
                    device = gr.Dropdown(devices(), value="cpu", label="Compute on", min_width=110)
                verify = number_field("Tensors to verify", "8", info="Computed anew in fp64 and compared; 0 for none")
                strict = gr.Checkbox(label="Refuse an adapter of which any tensor is not used", value=False)
            buttons = bench.buttons("merge", "Merge")
        with gr.Column(scale=5, min_width=320):
            result = bench.result(
                "merge", "Choose a checkpoint and adapters; memory for a few tensors is enough, whatever the model."
            )

    def work(job: Job, model: str, *values: Any) -> str:
        place, replace, numbers, where, checked, no_rest = values[2 * MOST :]
        path = bench.folders.reading(model or "", "Checkpoint")
        pairs = chosen(bench, values, 1)
        target = bench.folders.writing(place or "", replace)
        report = run(
            path,
            pairs,
            target,
            dtype=chosen_dtype(numbers),
            device=where,
            verify=max(0, whole(checked, "Tensors to verify") or 0),
            strict=no_rest,
            force=replace,
            progress=job.progress,
        )
        return stacked(bench.written(target), *_shown(report))

    bench.wire("merge", buttons, [base, *rows.inputs, *out, dtype, device, verify, strict], result, work)


def _shown(report: MergeReport) -> list[Markup]:
    read = [
        (one.name, one.read.dialect, one.strength, one.read.counts["layers"], one.read.counts["keys not used"] or "")
        for one in report.adapters
    ]
    unused = [(one.name, key, why) for one in report.adapters for key, why in one.read.unmatched.items()]
    said = [note for one in report.adapters for note in one.read.notes]
    return [
        _checked(report.verified),
        facts(
            (
                ("layers changed", f"{report.layers:,}", ""),
                ("tensors changed", f"{report.changed:,}", f"of {report.tensors:,}"),
                ("size", bytes_of(report.bytes), ""),
                ("numbers", report.dtype, report.rounded),
            )
        ),
        grid(("adapter", "dialect", "strength", "layers", "not used"), read, "What went in", numbers=(2, 3, 4)),
        grid(("adapter", "tensor", "why it was not used"), unused, "Not used"),
        notes(printable(note, 300) for note in (*said, *report.notes)),
    ]


def _checked(found: Verified | None) -> Markup:
    if found is None:
        return Markup()
    text = f"Verified in fp64: {found.tensors} tensors are {'' if found.holds else 'NOT '}as promised"
    more = (
        f"{found.differing:,} of {found.entries:,} entries are not the nearest number; the largest error is "
        f"{found.worst:.2g} of what one rounding allows"
    )
    return verdict(text, found.holds, more)
