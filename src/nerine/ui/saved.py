"""What is said of an adapter file that was written: its size, and which programs read it how."""

from __future__ import annotations

from pathlib import Path

from nerine.errors import NerineError
from nerine.files.readers import readers_of
from nerine.files.reports import ReaderRow, SaveReport
from nerine.tools.adapter_file import Form, given, laid, output_dialect
from nerine.tools.inspect.text import bytes_of
from nerine.tools.pages.marks import Markup
from nerine.ui.panels import grid, notes

__all__ = ["readers", "saved_facts"]


def saved_facts(report: SaveReport) -> list[tuple[str, object, str]]:
    """Figures at a glance."""
    return [
        ("dialect", report.dialect, ""),
        ("layers", report.layers, f"{report.tensors} tensors"),
        ("size", bytes_of(report.bytes), ""),
    ]


def readers(file: Path, base: Path | None = None) -> Markup:
    """A table: every program, whether it reads the file, and why not; or why that cannot be told."""
    try:
        with given(file, base) as found:
            form = Form(output_dialect(None, found.read))
            written = laid(found.read.layers, found.read, form, found.sites).written
            told = readers_of(written.layers, form.dialect)
    except NerineError as error:
        return notes([f"which programs read it cannot be told: {error}"])
    rows = [(row.reader, _answer(row), "" if row.worst is None else f"{row.worst:.2g}", row.why) for row in told]
    better = [f"as {row.better}" if row.better else "" for row in told]
    cells = [(*row, advice) for row, advice in zip(rows, better, strict=True)]
    return grid(("program", "reads it", "off by", "why", "exact"), cells, "Which programs read this file", numbers=(2,))


def _answer(row: ReaderRow) -> str:
    """In words: exactly, approximately, not, or how many of each."""
    counts = {"exactly": row.exactly, "approximately": row.approximately, "not": row.not_at_all}
    some = {word: count for word, count in counts.items() if count}
    if len(some) == 1:
        return {"exactly": "✓ exactly", "approximately": "≈ approximately", "not": "✗ not"}[next(iter(some))]
    return ", ".join(f"{count} {word}" for word, count in some.items())
