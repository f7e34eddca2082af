"""The history of a run: one line of JSON a step, in a file that only grows.

A step costs one write, and what was written is with the operating system: a killed run loses at most the line that it
was writing. This file knows steps and numbers; what they look like is `curve`'s and `page`'s to say.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nerine.errors import FormatError, shown
from nerine.files.atomic import replacing

__all__ = ["History", "Row", "spoken"]

Row = dict[str, float]  # {"step": 7, "loss": 0.12, ...}; counts are int

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # JSON has no such numbers: they are texts there


def spoken(value: float | None, digits: int = 3) -> str:
    """A number for people; "not finite" for NaN and the infinities, nothing where there is none."""
    if value is None:
        return ""
    return f"{value:.{digits}g}" if math.isfinite(value) else "not finite"


class History:
    """The rows of a run, in memory and in `file`, which need not exist yet.

    A row of a step is {"step", "loss", "lr", "grad_norm", "seconds", "memory" (bytes)}, one of a validation {"step",
    "validation"} and perhaps "validation_ema". Reading changes nothing; a last line that was cut off is cleared away by
    the first `append` or `rewind`.

    Raises:
        FormatError: the file cannot be read, or a line of it is damaged.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self.file = Path(file)
        self._rows, self._whole, self._cut = _read(self.file)

    @property
    def rows(self) -> tuple[Row, ...]:
        """All of them, in the order in which they were written."""
        return tuple(self._rows)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row, and give it to the operating system at once.

        Raises:
            FormatError: it has no step, something in it is no number, or the file cannot be written.
        """
        own = _checked(row, f"{self.file}: a new row")
        data = _line(own)
        try:
            if self._cut:
                os.truncate(self.file, self._whole)
            self._cut = True  # until the line is whole
            with open(self.file, "ab") as out:
                out.write(data)
        except OSError as error:
            raise FormatError(f"{self.file}: the history cannot be written: {error}") from error
        self._cut = False
        self._whole += len(data)
        self._rows.append(own)

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`, which a resumed run makes again; the file is replaced whole or not at all."""
        kept = [row for row in self._rows if row["step"] <= step]
        if not self.file.exists() or (len(kept) == len(self._rows) and not self._cut):
            return
        data = b"".join(map(_line, kept))
        with replacing(self.file) as out:
            out.write(data)
        self._rows, self._whole, self._cut = kept, len(data), False

    # -- what is in it -------------------------------------------------------------------------------------------------
    def column(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of the rows that have it; NaN and the infinities are among the values."""
        return [(int(row["step"]), row[name]) for row in self._rows if name in row]

    def losses(self) -> list[tuple[int, float]]:
        """(step, loss) of every step."""
        return self.column("loss")

    def validations(self, ema: bool = False) -> list[tuple[int, float]]:
        """(step, loss of the held-out pictures); with `ema`, that of the moving average of the values."""
        return self.column("validation_ema" if ema else "validation")


def _read(file: Path) -> tuple[list[Row], int, bool]:
    """The rows, the bytes of the whole lines, and whether something is left after them."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return [], 0, False
    except OSError as error:
        raise FormatError(f"{file}: the history cannot be read: {error}") from error
    whole = data.rfind(b"\n") + 1
    lines = data[:whole].split(b"\n")[:-1]
    rows = [_row(line, f"{file}: line {number}") for number, line in enumerate(lines, 1)]
    return rows, whole, whole < len(data)


def _row(line: bytes, where: str) -> Row:
    try:
        found = json.loads(line)
    except ValueError as error:  # one that UTF-8 cannot be is among them
        raise FormatError(f"{where}: expected a row of the history as JSON ({error}); mend or remove it") from None
    if not isinstance(found, dict):
        raise FormatError(f"{where}: expected a row of the history, found {shown(found, 80)}; mend or remove it")
    return _checked(found, where)


def _checked(row: Mapping[str, Any], where: str) -> Row:
    """The same with every value a number."""
    found = {name: _number(value) for name, value in row.items()}
    step: Any = found.get("step")
    if not isinstance(step, int) or step < 0:
        raise FormatError(f"{where}: expected a step, a whole number from 0 on, found {shown(row.get('step'), 80)}")
    for name, value in found.items():
        if value is None:
            raise FormatError(f"{where}: expected a number for {name!r}, found {shown(row[name], 80)}")
    return {name: value for name, value in found.items() if value is not None}


def _number(value: Any) -> float | None:
    """A number as it is or as the file has it (see `_NOT_FINITE`; null is read as NaN, too); None for anything else."""
    if value is None:
        return math.nan
    if isinstance(value, str):
        return _NOT_FINITE.get(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _line(row: Row) -> bytes:
    legal = {name: value if math.isfinite(value) else str(value) for name, value in row.items()}
    return (json.dumps(legal) + "\n").encode()
