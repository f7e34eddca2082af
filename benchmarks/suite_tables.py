"""What the performance suite prints: on what figures were made, and one line a contestant."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from suite_cases import Figures

__all__ = ["COLUMNS", "cells", "cpu_model", "header", "load", "notes", "shown", "text_table", "verdict"]

COLUMNS = (
    *("layer", "format", "mode", "row", "contestant", "rounds", "ms", "ratio", "median", "forward"),
    *("eval", "cached", "goal", ""),
    *("floor", "over", "kept", "kept/y", "peak", "W", "y", "note"),
)


def header(rounds: int | None = None) -> dict[str, str]:
    """On what the figures are made."""
    versions = {}
    for name in ("nerine", "lycoris-lora", "peft"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
        "cpu": cpu_model(),
        "threads": str(torch.get_num_threads()),
        **({} if rounds is None else {"rounds": str(rounds)}),
        "load before": load(),
    }


def load() -> str:
    """The load average over 1, 5 and 15 minutes."""
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def shown(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def verdict(reached: bool | None) -> str:
    return "" if reached is None else "reached" if reached else "not reached"


def cells(f: Figures) -> tuple[str, ...]:
    return (
        f.layer,
        f.precision,
        f.mode,
        f.row,
        f.contestant,
        str(f.rounds or ""),
        shown(f.best_ms, 1),
        shown(f.ratio),
        shown(f.median_ratio),
        shown(f.forward_ratio),
        shown(f.eval_ratio),
        shown(f.cached_ratio),
        shown(f.goal),
        verdict(f.reached),
        shown(f.floor),
        "" if f.over_floor is None else f"{f.over_floor:+.0%}",
        shown(f.kept),
        shown(f.kept_of_output),
        shown(f.peak),
        str(f.weight_sized or ""),
        str(f.output_sized or ""),
        f.note.split(":")[0],
    )


def text_table(figures: Sequence[Figures]) -> str:
    lines = [COLUMNS, *map(cells, figures)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def notes(figures: Sequence[Figures]) -> list[str]:
    return sorted({f"{f.contestant}, {f.row}: {f.note}" for f in figures if f.note})
