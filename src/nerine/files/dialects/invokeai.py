"""What InvokeAI reads exactly of the kohya dialect; a way to write, and read as kohya's.

Its DoRA is a LoRA without a Tucker core, with norms over input channels.
Source: InvokeAI `invokeai/backend/patches/layers/`.
"""

from __future__ import annotations

from nerine.algorithms import IA3, DoRA, Full, LoHa, LoKr, LowRank, Norm
from nerine.files.checkpoint import Base, Record
from nerine.files.dialects.base import Emitted, canonical
from nerine.files.dialects.kohya import Kohya
from nerine.files.rows import plain

__all__ = ["InvokeAI"]


class InvokeAI(Kohya):
    """The part of the kohya dialect that InvokeAI reads."""

    name = "invokeai"
    about = "InvokeAI"
    detected = False

    def refuses(self, record: Record) -> str:
        algorithm = record.algorithm
        if isinstance(algorithm, DoRA):
            if not isinstance(algorithm.inner, LowRank) or "mid" in record.params.tensors:
                return "InvokeAI has DoRA around a plain LoRA only"
            return "" if algorithm.axis == "in" else "InvokeAI takes DoRA norms over input channels only"
        known = LowRank | LoHa | LoKr | IA3 | Full | Norm
        return "" if isinstance(algorithm, known) else f"InvokeAI has no {type(algorithm).__name__}"

    def emit(self, record: Record, base: Base | None) -> Emitted:
        has_its_names = "down" in record.params.tensors
        return canonical(record if has_its_names else plain(record) or record)
