"""The PEFT dialect: a folder with `adapter_config.json` and `adapter_model.safetensors`.

A folder holds adapters of one kind: LoRA (with DoRA over outputs), LoHa, LoKr, IA3 or OFT, and beside them modules that
were trained whole. PEFT scales by alpha / r of the config, even where both factors of a LoKr are full, multiplies IA3
into the bias, and turns inputs where OFT is concerned: in one direction by the exact Cayley transform, in the other by
its series.
Source: PEFT 0.21 `tuners/`, `utils/save_and_load.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from nerine.algorithms import IA3, Full, LoHa, LoKr, Norm, OFTv2, Params
from nerine.errors import FormatError
from nerine.files.checkpoint import Base, Layer, Record
from nerine.files.dialects.base import Dialect, Emitted, canonical
from nerine.files.dialects.low_rank import low_rank_config, low_rank_emitted, low_rank_refusal, number, scaled_by
from nerine.files.dialects.peft_config import PeftConfig, common, patterns
from nerine.files.dialects.peft_lokr import lokr_config, lokr_refusal
from nerine.files.pieces import ALPHA, Piece, Stem
from nerine.files.store import Source
from nerine.ops.precision import wide

__all__ = ["Peft"]

SAVED = {"weight": "saved.weight", "bias": "saved.bias"}


class Peft(Dialect):
    """PEFT, and transformers through it."""

    name = "peft"
    about = "PEFT, transformers, TRL"
    prefixes: ClassVar[Mapping[str, str]] = {"base_model.model.": ""}
    flat = False
    folder = True
    renamed = SAVED

    def telling(self, source: Source) -> bool:
        return bool(source.config)

    # -- reading -------------------------------------------------------------------------------------------------
    def stem(self, text: str) -> Stem | None:
        found = super().stem(text)
        if found is None:
            return None
        name = (
            found.name.removesuffix(".base_layer").replace(".base_layer.", ".").replace(".modules_to_save.default", "")
        )
        return found._replace(name=name)

    def translate(self, stem: Stem, pieces: dict[str, Piece], source: Source) -> dict[str, Piece]:
        config = PeftConfig(source.config, str(source.path.parent / "adapter_config.json"))
        if "ia3_l" in pieces:
            return _ia3(config, stem, pieces)
        if "oft_R.weight" in pieces and config.flag("block_share"):
            raise FormatError(
                f"{source.path}: {stem.name} has one OFT block for all (block_share), which nerine does not read"
            )
        pieces = scaled_by(config, stem, pieces)
        if config.kind == "LOKR" and "lokr_w1" in pieces and "lokr_w2" in pieces and config.values:
            rank = int(config.number("r", 1))
            factor = config.scale(stem.name, rank)
            pieces["lokr_w1"] = pieces["lokr_w1"].changed(lambda t: t * factor)
        return pieces

    def settle(self, layer: Layer, stem: Stem, source: Source) -> Layer:
        config = PeftConfig(source.config, str(source.path))
        if isinstance(layer.algorithm, OFTv2):
            return replace(layer, algorithm=replace(layer.algorithm, terms=_terms(config)))
        if isinstance(layer.algorithm, IA3) and "w" in layer.shapes and layer.site.has_bias:
            return replace(layer, finish=_with_bias)
        return layer

    # -- writing -------------------------------------------------------------------------------------------------
    def refuses(self, record: Record) -> str:
        algorithm = record.algorithm
        if isinstance(algorithm, OFTv2 | Full | Norm):
            return ""
        if isinstance(algorithm, LoHa):
            return "" if record.site.kind != "embedding" else "PEFT has no LoHa for embeddings"
        if isinstance(algorithm, LoKr):
            return lokr_refusal(record)
        if isinstance(algorithm, IA3):
            outputs = "w" in record.params.tensors and record.site.has_bias
            return "PEFT multiplies IA3 on outputs into the bias, too" if outputs else ""
        return low_rank_refusal(record, "PEFT")

    def kind_of(self, record: Record) -> str:
        """The kind of folder that an adapter belongs in; empty for modules saved whole, which go into any."""
        algorithm = record.algorithm
        kinds = ((LoHa, "LOHA"), (LoKr, "LOKR"), (IA3, "IA3"), (OFTv2, "OFT"), ((Full, Norm), ""))
        return next((kind for classes, kind in kinds if isinstance(algorithm, classes)), "LORA")

    def emit(self, record: Record, base: Base | None) -> Emitted:
        algorithm, tensors = record.algorithm, record.params.tensors
        if isinstance(algorithm, Full | Norm):
            return _saved(record, base)
        if isinstance(algorithm, IA3):
            return {"ia3_l": _multiplier(record)}
        if isinstance(algorithm, OFTv2):
            return {"oft_R.weight": tensors["upper"]}
        if isinstance(algorithm, LoHa | LoKr):
            return _as_peft_shapes({key: t for key, t in canonical(record).items() if key != ALPHA}, record)
        emitted = low_rank_emitted(record)
        if record.site.kind == "embedding":
            return {_EMBEDDING.get(key, key): t for key, t in emitted.items()}
        return emitted

    def beside(self, records: Mapping[str, Record]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        (prefix,) = self.prefixes
        paths = {stem.removeprefix(prefix): record for stem, record in records.items()}
        adapted = {path: record for path, record in paths.items() if self.kind_of(record)}
        kinds = {self.kind_of(record) for record in adapted.values()}
        if len(kinds) > 1:
            raise FormatError(f"a PEFT folder holds adapters of one kind, and these are {', '.join(sorted(kinds))}")
        whole = sorted(set(paths) - set(adapted))
        kind = next(iter(kinds), "LORA")
        head = {"base_model_name_or_path": None, "inference_mode": True, "task_type": None, "peft_type": kind}
        return {**head, **_settings(kind, adapted), "modules_to_save": whole or None}, {}


_EMBEDDING = {"lora_A.weight": "lora_embedding_A", "lora_B.weight": "lora_embedding_B"}


def _settings(kind: str, records: Mapping[str, Record]) -> dict[str, Any]:
    if not records:
        return {"r": 1, "lora_alpha": 1, "target_modules": []}
    if kind == "LORA":
        return low_rank_config(records)
    targets = {"target_modules": sorted(records)}
    if kind == "IA3":
        inputs = [path for path, record in records.items() if "w_in" in record.params.tensors]
        return {**targets, "feedforward_modules": sorted(inputs)}
    if kind == "OFT":
        return {**targets, **_oft_settings(records)}
    if kind == "LOKR":
        return {**targets, **lokr_config(records)}
    ranks = {path: float(record.params.tensors["w1_b"].shape[0]) for path, record in records.items()}
    alphas = {path: record.params.scale * ranks[path] for path, record in records.items()}
    rank, alpha = common(ranks), common(alphas)
    tucker = any("t1" in record.params.tensors for record in records.values())
    return {
        **targets,
        "r": int(rank),
        "alpha": alpha,
        "rank_pattern": patterns(ranks, rank),
        "alpha_pattern": patterns(alphas, alpha),
        "use_effective_conv2d": tucker,
    }


def _oft_settings(records: Mapping[str, Record]) -> dict[str, Any]:
    sizes = {round((1 + (1 + 8 * r.params.tensors["upper"].shape[1]) ** 0.5) / 2) for r in records.values()}
    terms = {r.algorithm.terms for r in records.values() if isinstance(r.algorithm, OFTv2)}
    if len(sizes) > 1 or len(terms) > 1:
        raise FormatError("a PEFT folder has one OFT block size and number of terms for all layers, and these differ")
    count = terms.pop()
    return {
        "peft_version": "0.18.0",  # whose series this is; before, it ended otherwise
        "r": 0,
        "oft_block_size": sizes.pop(),
        "use_cayley_neumann": count > 0,
        "num_cayley_neumann_terms": count or 5,
        "block_share": False,
        "coft": False,
    }


def _terms(config: PeftConfig) -> int:
    """The number of terms of nerine's series that computes what the config asks for; 0 is the exact transform."""
    if not config.flag("use_cayley_neumann", True):
        return 0
    terms = int(config.number("num_cayley_neumann_terms", 5))
    if terms < 3:
        raise FormatError(f"{config.where}: a Cayley-Neumann series of {terms} terms is not read")
    return max(terms, 4)  # PEFT's series of three terms is its series of four


def _ia3(config: PeftConfig, stem: Stem, pieces: dict[str, Piece]) -> dict[str, Piece]:
    whole = pieces["ia3_l"]
    inputs = config.matches_feedforward(stem.name) if config.values else whole.shape[:1] == (1,)
    flat = tuple(n for n in whole.shape if n != 1) or (1,)
    shape = (1, *flat, *[1] * (len(whole.shape) - 2)) if len(whole.shape) > 2 else flat
    weight = whole.changed(lambda t: (wide(t) - 1).reshape(shape), shape)
    return {"weight": weight, "on_input": number(float(inputs))}


def _with_bias(record: Record, weight: Tensor, bias: Tensor | None) -> Record:
    """IA3 on outputs as PEFT has it: the bias is multiplied, too."""
    factor = wide(record.params.tensors["w"]).reshape(-1)
    diff = wide(weight) * record.site.over_rows(factor)
    tensors = {"diff": diff, **({} if bias is None else {"diff_b": wide(bias) * factor})}
    return Record(Full(), record.site, Params(tensors))


def _multiplier(record: Record) -> Tensor:
    """1 + w in PEFT's shape: `[1, in]`, `[out, 1]`, or `[1, channels, 1, 1]` on convolutions."""
    inputs = "w_in" in record.params.tensors
    flat = wide(record.params.tensors["w_in" if inputs else "w"]).reshape(-1) + 1  # in half precision w would be lost
    kernel = len(record.site.kernel)
    if kernel:
        return flat.reshape(1, -1, *[1] * kernel)
    return flat.reshape(1, -1) if inputs else flat.reshape(-1, 1)


def _as_peft_shapes(tensors: Emitted, record: Record) -> Emitted:
    """PEFT keeps the core of a one-dimensional convolution with a second kernel axis."""
    if len(record.site.kernel) != 1:
        return tensors
    return {key: t[..., None] if key in ("hada_t1", "hada_t2", "lokr_t2") else t for key, t in tensors.items()}


def _saved(record: Record, base: Base | None) -> Emitted:
    """The whole weight and bias of a module, which is how PEFT keeps what was trained without a decomposition."""
    if base is None:
        raise FormatError("PEFT keeps whole weights where nerine keeps differences: give the base")
    tensors, weight, bias = record.params.tensors, wide(base.weight()), base.bias()
    diff = tensors.get("diff")
    whole = weight if diff is None else weight + diff.to(weight).reshape(weight.shape)
    emitted = {"weight": record.site.native(whole)}
    if bias is not None:
        shift = tensors.get("diff_b")
        emitted["bias"] = wide(bias) if shift is None else wide(bias) + shift.to(wide(bias)).reshape(bias.shape)
    return emitted
