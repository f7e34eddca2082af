"""`compare`: how far two adapter files are apart, layer by layer, whatever their dialects and algorithms."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from nerine.files.folder import open_adapter
from nerine.files.store import Source
from nerine.tools.compare.matched import matched
from nerine.tools.compare.measure import row_of
from nerine.tools.compare.report import CompareReport, CompareRow
from nerine.tools.inspect.places import order_of, spot_of
from nerine.tools.progress import Progress, silent
from nerine.tools.weights import open_weights, read_adapter

__all__ = ["compare"]

SAME = 1e-6  # a relative distance below this is rounding of fp32


def compare(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    dialects: tuple[str | None, str | None] = (None, None),
    allow_pickle: bool = False,
    progress: Progress = silent,
    device: str | torch.device = "cpu",
) -> CompareReport:
    """How far the changes of two adapters are apart, of which two layers at a time are in memory.

    With `base`, a checkpoint of the model that they are for, names are looked up among its layers, and changes that
    depend on the weight can be compared. Low-rank changes are compared through their factors.

    Raises:
        FormatError: one of the files cannot be read, or does not belong to the base.
    """
    with ExitStack() as stack:
        sources = [stack.enter_context(open_adapter(file, allow_pickle=allow_pickle)) for file in (a, b)]
        weights = None if base is None else stack.enter_context(open_weights(base, allow_pickle=allow_pickle))
        first, second = (
            read_adapter(source, weights, dialect=dialect) for source, dialect in zip(sources, dialects, strict=True)
        )
        found = matched(first, sources[0], second, sources[1], weights is not None)
        rows = []
        for done, pair in enumerate(found.pairs):
            progress(done, len(found.pairs), pair.path)
            rows.append(row_of(pair, device))
        progress(len(rows), len(rows), "")
        rows.sort(key=lambda row: order_of(spot_of(row.layer), row.layer))
        left = bool(found.only_a or found.only_b)
        identical = "" if left else _identical(sources, rows)
        unused = [(src.path, len(one.report.unmatched)) for src, one in zip(sources, (first, second), strict=True)]
    return CompareReport(
        os.fspath(a),
        os.fspath(b),
        tuple(rows),
        found.only_a,
        found.only_b,
        identical,
        found.how,
        "" if base is None else os.fspath(base),
        tuple(f"{path}: {count} tensors were not used" for path, count in unused if count),
    )


def _identical(sources: Sequence[Source], rows: Sequence[CompareRow]) -> str:
    """See `CompareReport`; every layer is in both files."""
    a, b = sources
    if a.config == b.config:
        if filecmp.cmp(a.path, b.path, shallow=False):
            return "files"
        if all(row.same_tensors for row in rows) and _have_same_tensors(a, b):
            return "tensors"
    is_close = all(
        row.distance is not None and row.distance <= SAME and (row.bias_distance or 0.0) <= SAME and not row.why
        for row in rows
    )
    return "numbers" if is_close and rows else ""


def _have_same_tensors(a: Source, b: Source) -> bool:
    if a.keys != b.keys or any(a.dtype(key) != b.dtype(key) for key in a.keys):
        return False
    return all(torch.equal(a.read(key), b.read(key)) for key in a.keys)
