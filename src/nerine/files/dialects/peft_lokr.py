"""LoKr in PEFT: which factor shapes its settings can ask for, and the settings that ask for the ones at hand.

PEFT does not read the shapes of the tensors: it makes its own by one rule for the whole adapter, so that a LoKr can be
written only where some setting of that rule gives just these shapes.
Source: PEFT 0.21 `tuners/lokr/layer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nerine.errors import FormatError
from nerine.files.checkpoint import Record
from nerine.files.dialects.peft_config import common, patterns
from nerine.site import Site

__all__ = ["lokr_config", "lokr_refusal"]

Shapes = Mapping[str, tuple[int, ...]]


def lokr_refusal(record: Record) -> str:
    """Why PEFT cannot hold a LoKr of these shapes; empty where it can."""
    site = record.site
    if site.kind not in ("linear", "conv") or len(site.kernel) > 2:
        return f"PEFT has no LoKr for this kind of layer ({site.kind}{len(site.kernel) or ''})"
    if len(site.kernel) == 1 and site.kernel != (1,):
        return "PEFT orders the product of a LoKr on a one-dimensional convolution otherwise"
    if not _factors(record):
        return "PEFT makes factors of other shapes by its own rule"
    return ""


def lokr_config(records: Mapping[str, Record]) -> dict[str, Any]:
    """PEFT's settings for LoKr layers by path.

    Raises:
        FormatError: no one factor gives the shapes of all of them.
    """
    possible = set.intersection(*(_factors(record) for record in records.values()))
    both = {_is_pair(record, "w1") for record in records.values()}
    if not possible:
        raise FormatError("PEFT has one LoKr factor for all layers, and none gives the shapes of all of these")
    mixed = [
        path
        for path, record in records.items()
        if True in both and not _is_pair(record, "w1") and _rank(record) < max(_outer(record)) / 2
    ]
    if mixed:
        raise FormatError(f"PEFT decomposes the first factor of all layers or of none, and {mixed[0]} has it whole")
    ranks: dict[str, float] = {}
    alphas: dict[str, float] = {}
    for path, record in records.items():
        rank = _rank(record)
        ranks[path] = float(rank)
        alphas[path] = rank * (record.params.scale if _has_rank(record) else 1.0)
    usual, alpha = common(ranks), common(alphas)
    return {
        "r": int(usual),
        "alpha": alpha,
        "rank_pattern": patterns(ranks, usual),
        "alpha_pattern": patterns(alphas, alpha),
        "decompose_both": True in both,
        "decompose_factor": -1 if -1 in possible else min(possible),
        "use_effective_conv2d": any("t2" in record.params.tensors for record in records.values()),
    }


def _is_pair(record: Record, which: str) -> bool:
    return f"{which}_a" in record.params.tensors


def _has_rank(record: Record) -> bool:
    return _is_pair(record, "w1") or _is_pair(record, "w2")


def _rank(record: Record) -> int:
    """The rank of the tensors, or one for which PEFT makes both factors full."""
    t = record.params.tensors
    if "w2_b" in t:
        return int(t["w2_b"].shape[0])
    if "w1_b" in t:
        return int(t["w1_b"].shape[0])
    return max(t["w2"].shape[:2])


def _outer(record: Record) -> tuple[int, int]:
    """The sizes of w1."""
    t = record.params.tensors
    if "w1" in t:
        return int(t["w1"].shape[0]), int(t["w1"].shape[1])
    return int(t["w1_a"].shape[0]), int(t["w1_b"].shape[1])


def _factors(record: Record) -> set[int]:
    """The settings of PEFT's `decompose_factor` that give these shapes; both -1 and the sizes themselves are tried."""
    site: Site = record.site
    rows, columns = _outer(record)
    found = set()
    for factor in {-1, rows, columns, max(rows, columns)}:
        if (_split(site.shape[0], factor)[0], _split(site.shape[1], factor)[0]) == (rows, columns):
            found |= {factor} if _same_form(record, rows, columns) else set()
    return found


def _same_form(record: Record, rows: int, columns: int) -> bool:
    """Whether PEFT decomposes the same factors at this rank."""
    rank, site = _rank(record), record.site
    inner = max(site.shape[0] // rows, site.shape[1] // columns)
    if _is_pair(record, "w2") != (rank < inner / 2):
        return False
    return not _is_pair(record, "w1") or rank < max(rows, columns) / 2


def _split(size: int, factor: int) -> tuple[int, int]:
    """PEFT's two factors of a size: `factor` itself where it divides, else the divisor nearest to the root below it."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    small, large = 1, size
    for divisor in range(2, size + 1):
        if small >= large:
            break
        if size % divisor:
            continue
        if divisor + size // divisor > 1 + size or divisor > limit:
            break
        small, large = divisor, size // divisor
    return min(small, large), max(small, large)
