"""Several files, each with its strength: rows of fields of which one more is shown at a click."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from nerine.errors import OptionError
from nerine.ui.bench import SETTLED, Bench, decimal, number_field

__all__ = ["Shelf", "chosen", "shelf"]

MOST = 6


class Shelf(NamedTuple):
    """The fields, in the order in which `chosen` takes their values: all files, then all strengths."""

    files: Sequence[gr.Dropdown]
    strengths: Sequence[gr.Textbox]

    @property
    def inputs(self) -> list[Any]:
        return [*self.files, *self.strengths]


def shelf(bench: Bench, name: str, shown: int) -> Shelf:
    """Lay out the rows; `shown` of them are there from the start."""
    count = gr.State(shown)
    files, strengths, rows = [], [], []
    for at in range(MOST):
        with gr.Group(visible=at < shown, elem_classes="ne-row") as row:
            files.append(bench.file(f"Adapter {at + 1}", f"{name}-file-{at + 1}"))
            strengths.append(number_field("Strength", "1.0", name=f"{name}-strength-{at + 1}"))
        rows.append(row)
    more = gr.Button("Add another adapter", size="sm", variant="secondary", elem_id=f"{name}-more")

    def add(now: int) -> list[Any]:
        after = min(now + 1, MOST)
        return [after, *(gr.update(visible=at < after) for at in range(MOST)), gr.update(visible=after < MOST)]

    more.click(add, [count], [count, *rows, more], **SETTLED)
    return Shelf(files, strengths)


def chosen(bench: Bench, values: Sequence[Any], least: int) -> list[tuple[Path, float]]:
    """(file, strength) of the rows that are filled.

    Raises:
        OptionError: there are fewer than `least`, a file is not to be read, or a strength is missing.
    """
    found = []
    for at, (text, strength) in enumerate(zip(values[:MOST], values[MOST : 2 * MOST], strict=True), 1):
        if not text:
            continue
        number = decimal(strength, f"Strength of adapter {at}")
        if number is None:
            raise OptionError(f"Adapter {at}: give its strength as a number")
        found.append((bench.folders.reading(text, f"Adapter {at}"), number))
    if len(found) < least:
        raise OptionError(f"choose {'one adapter' if least == 1 else f'{least} adapters'} at least, found {len(found)}")
    return found
