"""Low-rank adapters as PEFT and diffusers have them: lora_A, lora_B, a magnitude vector, and alpha in the settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from nerine.algorithms import DoRA
from nerine.files.checkpoint import Record
from nerine.files.dialects.base import Emitted
from nerine.files.dialects.peft_config import PeftConfig, common, patterns
from nerine.files.pieces import ALPHA, MAGNITUDE, Piece, Stem
from nerine.files.rows import is_low_rank, plain

__all__ = ["low_rank_config", "low_rank_emitted", "low_rank_refusal", "number", "scaled_by"]


_RANKED = ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")  # tensors whose first axis is the rank


def scaled_by(config: PeftConfig, stem: Stem, pieces: dict[str, Piece]) -> dict[str, Piece]:
    """The pieces of a low-rank layer with the scale that the settings give, and magnitudes over outputs."""
    pieces = dict(pieces)
    if MAGNITUDE in pieces and "lora_up.weight" in pieces:
        out = pieces["lora_up.weight"].shape[:1]
        shape = (*out, 1)
        whole = pieces[MAGNITUDE]
        if whole.shape != shape and math.prod(whole.shape) == math.prod(out):
            pieces[MAGNITUDE] = whole.changed(lambda t: t.reshape(shape), shape)
    rank = next((pieces[key].shape[0] for key in _RANKED if key in pieces and pieces[key].shape), 0)
    if rank and ALPHA not in pieces and config.values:
        pieces["scale"] = number(config.scale(stem.name, rank))
    return pieces


def number(value: float) -> Piece:
    """A piece that stands in no key of the file, with a number that the settings give."""
    return Piece("", (), torch.float64, lambda: torch.tensor(value, dtype=torch.float64))


def low_rank_refusal(record: Record, who: str) -> str:
    """Why an adapter is nothing that a LoRA with DoRA over outputs could be; empty where it is."""
    if not is_low_rank(record):
        return f"{who} reads low-rank adapters only, and this is {type(record.algorithm).__name__}"
    if isinstance(record.algorithm, DoRA) and record.algorithm.axis == "in":
        return f"{who} takes DoRA norms over outputs only, and this one is over input channels"
    if record.site.groups > 1:
        return f"{who} computes another function for a low-rank adapter on a grouped convolution"
    return ""


def low_rank_emitted(record: Record) -> Emitted:
    """lora_A, lora_B with the scale in it, and the magnitudes `[out]` (`[1, out, 1, ...]` on convolutions)."""
    found = plain(record)
    assert found is not None, "refused before"
    tensors = found.params.tensors
    up = tensors["up"]
    emitted = {"lora_A.weight": tensors["down"], "lora_B.weight": up}
    if "magnitude" in tensors:
        ones = [1] * len(record.site.kernel)
        shape = (1, -1, *ones) if ones else (-1,)
        emitted["lora_magnitude_vector"] = tensors["magnitude"].reshape(shape)
    return emitted


def low_rank_config(records: Mapping[str, Record]) -> dict[str, Any]:
    """PEFT's settings of plain low-rank layers (by path) whose scale is in their tensors."""
    ranks = {path: _rank_in(record) for path, record in records.items()}
    usual = common({path: float(rank) for path, rank in ranks.items()})
    differing = patterns({path: float(rank) for path, rank in ranks.items()}, usual)
    return {
        "peft_type": "LORA",
        "r": int(usual),
        "lora_alpha": int(usual),
        "rank_pattern": differing,
        "alpha_pattern": dict(differing),
        "target_modules": sorted(records),
        "use_dora": any(isinstance(record.algorithm, DoRA) for record in records.values()),
        "use_rslora": False,
        "lora_bias": False,
        "bias": "none",
    }


def _rank_in(record: Record) -> int:
    found = plain(record)
    assert found is not None
    return int(found.params.tensors["down"].shape[0])
