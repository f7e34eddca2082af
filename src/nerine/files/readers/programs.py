"""The programs that read adapter files, and what each makes of an adapter in a dialect: a table of rules.

Source: ComfyUI, Forge, A1111, diffusers, PEFT, sd-scripts and InvokeAI as they were in 2026; docs/files.md names those
that the tests run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from nerine.algorithms import BOFT, IA3, DiagOFT, DoRA, Full, GLoRA, LoHa, LoKr, LowRank, Norm
from nerine.files.checkpoint import Record
from nerine.files.dialects.base import Dialect
from nerine.files.dialects.comfy import unread as unread_by_comfyui
from nerine.files.dialects.low_rank import low_rank_refusal
from nerine.files.dialects.peft_config import common
from nerine.files.names import flatten

__all__ = ["READERS", "Reader", "Verdict"]


class Verdict(NamedTuple):
    """ "exact", "near" or "no"; why not exactly; the formula by which the program computes instead, and its number."""

    level: str
    why: str = ""
    formula: str = ""
    factor: float = 1.0


EXACT = Verdict("exact")


class Reader(NamedTuple):
    """One program: the dialects whose names it knows, and what it makes of an adapter in one of them."""

    name: str
    dialects: frozenset[str]
    rule: Callable[[Record, str], Verdict]
    together: Callable[[Mapping[str, Record], str], Mapping[str, Verdict]] = lambda records, dialect: {}

    def judge_all(self, records: Mapping[str, Record], dialect: Dialect) -> dict[str, Verdict]:
        """What this program makes of the adapters of a file (their shapes alone)."""
        found = {stem: self.judge(record, dialect) for stem, record in records.items()}
        others = self.together(records, dialect.name)
        return {stem: others.get(stem, v) if v.level == "exact" else v for stem, v in found.items()}

    def judge(self, record: Record, dialect: Dialect) -> Verdict:
        """What this program makes of an adapter (its shapes alone) in a file of `dialect`."""
        if dialect.name not in self.dialects:
            return Verdict("no", f"does not know the names of the {dialect.name} dialect")
        return self.rule(record, dialect.name)


def _no(why: str) -> Verdict:
    return Verdict("no", why) if why else EXACT


def _parts(record: Record, dialect: str) -> tuple[object, str, set[str]]:
    """The algorithm inside of a DoRA, the axis of that or "", and the names of the tensors as they are written."""
    algorithm, names = record.algorithm, set(record.params.tensors)
    inner = algorithm.inner if isinstance(algorithm, DoRA) else algorithm
    if "p" in names and dialect in _AS_LORA:
        names = {"down", "up"}
    return inner, getattr(algorithm, "axis", ""), names


_AS_LORA = {"diffusers", "peft", "comfy", "ai-toolkit", "invokeai"}  # dialects that write T-LoRA as the LoRA that it is


def _comfyui(record: Record, dialect: str) -> Verdict:
    inner, axis, names = _parts(record, dialect)
    if isinstance(inner, DiagOFT) and "rescale" in names and dialect != "comfy":
        return Verdict("near", "leaves out the rescale of Diag-OFT", "comfy-oft")
    if why := unread_by_comfyui(record):
        return _no(why)
    if axis and dialect in ("diffusers", "ai-toolkit"):
        return Verdict("near", "leaves out DoRA magnitudes under that name", "no-magnitude")
    if dialect == "comfy":
        return EXACT
    if axis == "out":
        return Verdict("near", "divides a DoRA norm over outputs by that of the base", "comfy-dora")
    if isinstance(inner, DiagOFT | BOFT) and record.params.scale:
        return Verdict("near", "takes the bound of a rotation without the number of outputs", "comfy-oft")
    if "p" in names:
        return _no("has no T-LoRA")
    return _no("stumbles over a LoKr with a Tucker core") if "t2" in names and isinstance(inner, LoKr) else EXACT


_ENCODER = re.compile(r"(lora_te\d?_|lycoris_text_encoder(?:_\d)?_|text_encoders\.\w+?\.transformer\.)(.+)")
_CLIP = re.compile(r"text_model_encoder_layers_\d+_(mlp_fc[12]|self_attn_(q|k|v|out)_proj)|text_projection")
_T5 = re.compile(r"(encoder_)?block_\d+_.*|shared|encoder_final_layer_norm")


def _text_encoders(records: Mapping[str, Record], dialect: str) -> dict[str, Verdict]:
    """ComfyUI goes by names that tell the kind of a text encoder, and knows few of them under other names."""
    found = {}
    for stem in records:
        match = _ENCODER.fullmatch(stem)
        if match is None:
            continue
        lead, name = match[1], flatten(match[2])
        if not name.startswith("text_") and not _T5.fullmatch(name):
            found[stem] = _no("does not find this text encoder, which it calls by the model's own name")
        elif dialect == "lycoris":
            found[stem] = _no("knows no text encoders under names of the lycoris dialect")
        elif dialect == "kohya" and not name.startswith("text_") and lead not in ("lora_te2_", "lora_te3_"):
            found[stem] = _no("knows T5 as second or third text encoder only under names of the kohya dialect")
        elif dialect == "kohya" and name.startswith("text_") and not _CLIP.fullmatch(name):
            found[stem] = _no("knows attention and MLP of CLIP only under names of the kohya dialect")
    return found


def _forge(record: Record, dialect: str) -> Verdict:
    inner, _, _ = _parts(record, dialect)
    return _no("has no rotations") if isinstance(inner, DiagOFT | BOFT) else _comfyui(record, dialect)


def _a1111(record: Record, dialect: str) -> Verdict:
    inner, axis, names = _parts(record, dialect)
    if len(record.site.kernel) in (1, 3) or record.site.kind not in ("linear", "conv", "norm"):
        return _no("patches linear layers, two-dimensional convolutions and norms only")
    if "p" in names or not isinstance(inner, LowRank | LoHa | LoKr | IA3 | Full | Norm | DiagOFT | BOFT | GLoRA):
        return _no(f"has no {type(inner).__name__}")
    if isinstance(inner, GLoRA):
        return _no("computes the older layout of GLoRA only")
    if isinstance(inner, Norm) and "diff_b" not in names:
        return _no("wants both tensors of a norm")
    if axis == "out":
        return Verdict("near", "takes every DoRA norm over inputs", "input-norm")
    return EXACT


def _diffusers(record: Record, dialect: str) -> Verdict:
    _, axis, names = _parts(record, dialect)
    if dialect == "kohya":
        if why := low_rank_refusal(record, "diffusers"):
            return _no(why.removeprefix("diffusers "))
        if "mid" in names or "p" in names:
            return _no("reads plain LoRA only")
        return Verdict("near", "drops DoRA magnitudes, with a warning", "no-magnitude") if axis else EXACT
    return _no(low_rank_refusal(record, "diffusers").removeprefix("diffusers "))


def _one_alpha(records: Mapping[str, Record], dialect: str) -> dict[str, Verdict]:
    """diffusers takes one alpha for all layers of a kohya file, the one that most have."""
    if dialect != "kohya":
        return {}
    alphas = {
        stem: record.params.scale * record.params.tensors["down"].shape[0]
        for stem, record in records.items()
        if set(record.params.tensors) == {"down", "up"}
    }
    usual = common(alphas) if alphas else 1.0
    why = "takes the alpha that most layers have for all of them"
    return {stem: Verdict("near", why, "scaled", usual / a) for stem, a in alphas.items() if a and a != usual}


def _peft(record: Record, dialect: str) -> Verdict:
    return EXACT  # what it does not read exactly is refused before it is written


def _sd_scripts(record: Record, dialect: str) -> Verdict:
    inner, axis, names = _parts(record, dialect)
    if axis:
        return _no("has no DoRA")
    if isinstance(inner, LowRank):
        return _no("reads plain LoRA only") if "mid" in names or "p" in names else EXACT
    if isinstance(inner, LoHa) or (isinstance(inner, LoKr) and "w1" in names):
        return EXACT
    return _no(f"has no {type(inner).__name__} under these names")


def _invokeai(record: Record, dialect: str) -> Verdict:
    inner, axis, names = _parts(record, dialect)
    if axis and not (isinstance(inner, LowRank) and "mid" not in names):
        return _no("has DoRA around a plain LoRA only")
    if axis == "out" and dialect != "diffusers":
        return Verdict("near", "takes a DoRA norm of these files over inputs", "input-norm")
    if "p" in names or not isinstance(inner, LowRank | LoHa | LoKr | IA3 | Full | Norm):
        return _no(f"has no {type(inner).__name__}")
    return EXACT


READERS = (
    Reader(
        "ComfyUI",
        frozenset({"lycoris", "kohya", "diffusers", "comfy", "onetrainer", "ai-toolkit", "invokeai", "bare"}),
        _comfyui,
        _text_encoders,
    ),
    Reader("A1111", frozenset({"kohya", "invokeai"}), _a1111),
    Reader("Forge", frozenset({"kohya", "invokeai", "diffusers"}), _forge),
    Reader("diffusers", frozenset({"diffusers", "kohya", "ai-toolkit"}), _diffusers, _one_alpha),
    Reader("PEFT", frozenset({"peft"}), _peft),
    Reader("sd-scripts", frozenset({"kohya", "invokeai"}), _sd_scripts),
    Reader("InvokeAI", frozenset({"kohya", "invokeai", "diffusers", "onetrainer", "ai-toolkit"}), _invokeai),
)
