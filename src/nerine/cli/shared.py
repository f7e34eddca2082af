"""What the commands share: options of one meaning, a progress bar for a tool, and how a report is shown.

Nothing here imports torch: help must come at once.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import typer

from nerine.cli.choices import devices, dialects, formats, targets
from nerine.cli.terminal import say
from nerine.errors import OptionError, nearest

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = [
    "DEVIATES",
    "DEVICE",
    "DRY_RUN",
    "DTYPE",
    "FORCE",
    "FROM",
    "JSON",
    "OUT",
    "PICKLE",
    "TARGETS",
    "bar",
    "dtype_of",
    "pairs",
    "show",
    "size_of",
    "split_strength",
]

DEVIATES = 3  # exit code: what was to be checked is not as promised
_FORMATS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}

JSON: bool = typer.Option(False, "--json", help="The report as JSON on stdout.")
OUT: Path = typer.Option(..., "--out", "-o", help="Where to write.")
FORCE: bool = typer.Option(False, "--force", help="Replace what is there.")
DRY_RUN: bool = typer.Option(False, "--dry-run", help="Do everything but write.")
DEVICE: str = typer.Option(
    "cpu", "--device", help="Where to compute: cpu, cuda, cuda:1, mps, ...", autocompletion=devices
)
DTYPE: str | None = typer.Option(
    None, "--dtype", help="fp32, fp16 or bf16 for what is written; as it was if left out.", autocompletion=formats
)
FROM: str | None = typer.Option(
    None, "--from", help="The dialect of FILE, where it cannot be told.", autocompletion=dialects
)
TARGETS: list[str] = typer.Option(
    [], "--targets", help="A preset or pattern of layers; can be given again.", autocompletion=targets
)
PICKLE: bool = typer.Option(
    False, "--allow-pickle", help="Read .ckpt, .pt and .bin as well (tensors alone, no code is run)."
)


class Report(Protocol):
    """What a tool gives back."""

    def to_dict(self) -> dict[str, Any]: ...


def show(report: Report, as_json: bool) -> None:
    """The report on stdout: as JSON (numbers that are none become null there), or as the text that it is."""
    if as_json:
        say(json.dumps(_plain(report.to_dict()), indent=2, default=str, allow_nan=False))
    else:
        say(str(report))


def _plain(value: Any) -> Any:
    """Data with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr for a tool's progress, from its second second on; nothing where there is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from nerine.cli.terminal import console, is_live

    screen = console(stderr=True)
    columns = (
        TextColumn(title),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[what]}", style="dim"),
    )
    progress = Progress(*columns, console=screen, transient=True, refresh_per_second=8)
    task = progress.add_task("", total=None, what="")
    began, shown = time.monotonic(), False

    def report(done: int, total: int, what: str) -> None:
        nonlocal shown
        if not is_live(screen.file):
            return
        if not shown and time.monotonic() - began > 1:
            progress.start()
            shown = True
        progress.update(task, completed=done, total=total, what=what[-40:])

    try:
        yield report
    finally:
        if shown:
            progress.stop()


def dtype_of(text: str | None) -> torch.dtype | None:
    """The number format of that name.

    Raises:
        OptionError: there is none.
    """
    if text is None:
        return None
    import torch

    name = _FORMATS.get(text, text)
    if name not in _FORMATS.values():
        raise OptionError(f"--dtype: there is no format {text!r}. {nearest(text, _FORMATS)}")
    found: torch.dtype = getattr(torch, name)
    return found


def size_of(text: str) -> int:
    """Bytes of "20MB", "1.5GiB", "800000".

    Raises:
        OptionError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise OptionError(f"--size: expected bytes such as 20MB, 1.5GiB or 800000, found {text!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def pairs(texts: list[str], option: str) -> dict[str, str]:
    """{key: value} of "key=value".

    Raises:
        OptionError: one of them has no "=".
    """
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise OptionError(f"{option}: expected key=value, found {text!r}")
        found[key] = value
    return found


def split_strength(text: str) -> tuple[str, float | dict[Any, float]]:
    """A file and its strength from "FILE", "FILE:0.8" or "FILE:unet=0.8,text_encoder=0.4".

    Raises:
        OptionError: what follows the last colon is meant as a strength and is none.
    """
    file, colon, tail = text.rpartition(":")
    if not colon or not file or "/" in tail or "\\" in tail:  # C:\file.safetensors has a colon of its own
        return text, 1.0
    if Path(text).exists():
        return text, 1.0
    try:
        if "=" not in tail:
            return file, float(tail)
        return file, {
            name: float(value) for name, value in (part.rsplit("=", 1) for part in re.split(r",(?![^\[]*\])", tail))
        }
    except ValueError:
        raise OptionError(
            f"{text}: expected FILE, FILE:0.8 or FILE:unet=0.8,text_encoder=0.4, found the strength {tail!r}"
        ) from None
