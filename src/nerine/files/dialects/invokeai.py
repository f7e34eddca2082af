"""What InvokeAI reads exactly of the kohya dialect; a way to write, and read as kohya's.

Its DoRA is a LoRA without a Tucker core, with norms over input channels.
Source: InvokeAI `invokeai/backend/patches/layers/`.
"""

from __future__ import annotations

from nerine.algorithms import IA3, DoRA, Full, LoHa, LoKr, LowRank, Norm
from nerine.files.checkpoint import Record
from nerine.files.dialects.kohya import Kohya

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
        if isinstance(algorithm, LowRank) and {"down", "up"} <= set(record.params.tensors):
            return ""
        if isinstance(algorithm, LoHa | LoKr | IA3 | Full | Norm):
            return ""
        return f"InvokeAI has no {type(algorithm).__name__}"
