"""The ai-toolkit dialect: `transformer.<path>.lora_A.weight` without any alpha, `.magnitude` for DoRA, `.diff` dense.

Only a LoKr keeps its alpha, and both of its factors whole a placeholder for one, which counts for nothing.
Source: ai-toolkit `toolkit/network_mixins.py`, `toolkit/lora_special.py`, `toolkit/models/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from nerine.algorithms import Full, LoKr
from nerine.files.checkpoint import Base, Record
from nerine.files.dialects.base import DENOISER, Dialect, Emitted, canonical
from nerine.files.dialects.low_rank import low_rank_emitted, low_rank_refusal
from nerine.files.store import Source

__all__ = ["AiToolkit"]


class AiToolkit(Dialect):
    """ai-toolkit's files for transformers; those for UNets are in the kohya dialect."""

    name = "ai-toolkit"
    about = "ai-toolkit"
    prefixes: ClassVar[Mapping[str, str]] = {
        "transformer.": DENOISER,
        "diffusion_model.": DENOISER,
        "text_encoder.": "text_encoder",
    }
    flat = False
    naming = "diffusers"
    variant = True

    def telling(self, source: Source) -> bool:
        wrote = "ai-toolkit" in source.metadata.get("software", "")
        return wrote or any(key.endswith((".magnitude", ".diff", ".diff_b")) for key in source.keys)

    def refuses(self, record: Record) -> str:
        if isinstance(record.algorithm, Full):
            return ""
        if isinstance(record.algorithm, LoKr):
            return "ai-toolkit has no Tucker cores" if "t2" in record.params.tensors else ""
        if record.site.kernel and "magnitude" in record.params.tensors:
            return "ai-toolkit has no DoRA on convolutions"
        return low_rank_refusal(record, "ai-toolkit")

    def emit(self, record: Record, base: Base | None) -> Emitted:
        if isinstance(record.algorithm, Full | LoKr):
            return canonical(record)
        names = {"lora_magnitude_vector": "magnitude"}
        return {names.get(key, key): t for key, t in low_rank_emitted(record).items()}
