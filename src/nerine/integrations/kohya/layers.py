"""Which layers of a model get what: the preset chooses, and sd-scripts' own arguments change ranks, rates and choice.

Names that sd-scripts looks for in its arguments are those of layers in files ("lora_unet_double_blocks_0_img_mlp_0").
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from nerine.errors import OptionError
from nerine.integrations.kohya.arguments import indices
from nerine.integrations.kohya.blocks import Blocks
from nerine.integrations.kohya.parts import Part
from nerine.model.layer import layer_kind
from nerine.model.sharded import shape_of

__all__ = ["Choice", "refine"]


@dataclass(frozen=True)
class Choice:
    """A layer that gets an adapter: options of its own, the multiple of the learning rate and the rate itself where a
    rule names one (with its number), its block, and the rows that it has each an adapter of their own for."""

    path: str
    lora_name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    lr_weight: float = 1.0
    lr: tuple[int, float] | None = None
    block: int | None = None
    rows: tuple[tuple[int, int], ...] = ()

    def with_dim(self, dim: int | None, alpha: float | None = None) -> Choice:
        """The same with another rank (None: as it is)."""
        found = dict(self.options)
        if dim is not None:
            found["dim"] = dim
        if alpha is not None:
            found["alpha"] = alpha
        return replace(self, options=found)


# In which layers of the denoiser an argument sets the rank: texts that their names hold, in the order of precedence.
_RANKS: Mapping[str, tuple[str, ...]] = {
    "img_attn_dim": ("img_attn",),
    "txt_attn_dim": ("txt_attn",),
    "img_mlp_dim": ("img_mlp",),
    "txt_mlp_dim": ("txt_mlp",),
    "img_mod_dim": ("img_mod",),
    "txt_mod_dim": ("txt_mod",),
    "single_dim": ("single_blocks", "linear"),
    "single_mod_dim": ("modulation",),
    "context_attn_dim": ("context_block", "attn"),
    "context_mlp_dim": ("context_block", "mlp"),
    "context_mod_dim": ("context_block", "adaLN_modulation"),
    "x_attn_dim": ("x_block", "attn"),
    "x_mlp_dim": ("x_block", "mlp"),
    "x_mod_dim": ("x_block", "adaLN_modulation"),
    "attn_dim": ("attention",),
    "mlp_dim": ("mlp",),
    "mod_dim": ("modulation",),
    "refiner_dim": ("refiner",),
}
# Layers outside of the blocks, each with a rank in a list: the texts in their names.
_OUTSIDE: Mapping[str, tuple[str, ...]] = {
    "in_dims": ("_img_in", "_time_in", "_vector_in", "_guidance_in", "_txt_in"),
    "emb_dims": (
        "context_embedder",
        "_t_embedder",
        "x_embedder",
        "y_embedder",
        "final_layer_adaLN_modulation",
        "final_layer_linear",
    ),
    "embedder_dims": ("x_embedder", "t_embedder", "cap_embedder"),
}
_INDICES: Mapping[str, str] = {
    "train_double_block_indices": "double_blocks",
    "train_single_block_indices": "single_blocks",
    "train_block_indices": "joint_blocks|layers",
}
_TRAIN_BLOCKS: Mapping[str, tuple[str, ...]] = {
    "all": ("",),
    "double": ("_double_",),
    "single": ("_single_",),
    "transformer": ("_unet_layers_",),
    "noise_refiner": ("noise_refiner",),
    "context_refiner": ("context_refiner",),
    "refiners": ("noise_refiner", "context_refiner"),
}
_FUSED = ("qkv", "linear1")


def refine(part: Part, chosen: Sequence[Choice], given: Mapping[str, Any]) -> list[Choice]:
    """The layers that a preset chose of a part, after sd-scripts' own arguments; those of rank 0 are left out.

    Raises:
        OptionError: an argument does not fit this model.
    """
    found = list(chosen)
    if part.number == 0:
        found = [choice for choice in found if _is_trained(choice, given)]
        found += _outside(part, found, given)
        found = [_ranked(choice, given) for choice in found]
        found = _by_block(part, found, given)
    found = [_by_pattern(choice, given) for choice in found]
    found = [_with_rate(choice, given) for choice in found]
    if part.number == 0 and given.get("split_qkv"):
        found = [_split(part.model, choice) for choice in found]
    return [choice for choice in found if choice.options.get("dim") != 0]


def _is_trained(choice: Choice, given: Mapping[str, Any]) -> bool:
    blocks = given.get("train_blocks")
    if blocks is not None:
        if blocks not in _TRAIN_BLOCKS:
            raise OptionError(f"train_blocks: expected one of {', '.join(_TRAIN_BLOCKS)}, got {blocks!r}")
        if not any(text in choice.lora_name for text in _TRAIN_BLOCKS[blocks]):
            return False
    for name, stem in _INDICES.items():
        inside = re.search(rf"(?:{stem})_(\d+)_", choice.lora_name)
        wanted = None if given.get(name) is None else indices(name, given[name])
        if inside and wanted is not None and int(inside.group(1)) not in wanted:
            return False
    excluded = any(re.fullmatch(pattern, choice.path) for pattern in given.get("exclude_patterns") or ())
    return not excluded or any(re.fullmatch(pattern, choice.path) for pattern in given.get("include_patterns") or ())


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if layer_kind(module) in ("linear", "conv"):
            yield path, module


def _outside(part: Part, chosen: Sequence[Choice], given: Mapping[str, Any]) -> list[Choice]:
    """Layers that only an argument asks for."""
    have = {choice.path for choice in chosen}
    found: dict[str, Choice] = {}
    paths = [path for path, _ in _layers(part.model)]

    def ask(path: str, dim: int | None) -> None:
        if path not in have and path not in found:
            found[path] = Choice(path, part.lora_name(path)).with_dim(dim)

    for name, texts in _OUTSIDE.items():
        ranks = given.get(name)
        if ranks is None:
            continue
        if len(ranks) != len(texts):
            raise OptionError(f"{name}: expected {len(texts)} ranks ({', '.join(texts)}), got {len(ranks)}")
        for text, dim in zip(texts, ranks, strict=True):
            for path in paths:
                if text in part.lora_name(path):
                    ask(path, dim)
    for pattern in given.get("include_patterns") or ():
        for path in paths:
            if re.fullmatch(pattern, path):
                ask(path, None)
    return list(found.values())


def _ranked(choice: Choice, given: Mapping[str, Any]) -> Choice:
    for name, texts in _RANKS.items():
        if given.get(name) is not None and all(text in choice.lora_name for text in texts):
            return choice.with_dim(given[name])
    return choice


def _by_block(part: Part, chosen: list[Choice], given: Mapping[str, Any]) -> list[Choice]:
    """Ranks, alphas and rates by the blocks of SD's UNets."""
    if all(given.get(name) is None for name in _BY_BLOCK):
        return chosen
    layers = dict(_layers(part.model))
    if not any(path.startswith(("down_blocks.", "input_blocks.")) for path in layers):
        asked = ", ".join(name for name in _BY_BLOCK if given.get(name) is not None)
        raise OptionError(f"{asked}: this model has no blocks of a UNet; use network_reg_dims and network_reg_lrs")
    blocks = Blocks(list(layers))
    weights = blocks.lr_weights(given)
    kinds = {"block": ("block_dims", "block_alphas"), "conv": ("conv_block_dims", "conv_block_alphas")}
    lists = {kind: [blocks.listed(name, given.get(name)) for name in names] for kind, names in kinds.items()}
    leaves_out = given.get("conv_dim") is None and lists["block"][0] is not None
    return [
        _in_block(choice, blocks.of(choice.path), layers.get(choice.path), lists, weights, leaves_out)
        for choice in chosen
    ]


_BY_BLOCK = (
    "block_dims",
    "block_alphas",
    "conv_block_dims",
    "conv_block_alphas",
    "down_lr_weight",
    "mid_lr_weight",
    "up_lr_weight",
)


def _in_block(
    choice: Choice,
    block: int,
    layer: nn.Module | None,
    lists: Mapping[str, list[Any]],
    weights: list[float] | None,
    leaves_out: bool,
) -> Choice:
    """A layer in its block; `leaves_out` says that convolutions without a rank have none, for the ranks of blocks are
    those of linear layers."""
    if block < 0:
        return choice
    if weights is not None:
        choice = replace(choice, lr_weight=weights[block], block=block)
        if weights[block] == 0:
            return choice.with_dim(0)
    kernel = getattr(layer, "kernel_size", (1,))
    is_conv = any(size != 1 for size in kernel)
    dims, alphas = lists["conv" if is_conv else "block"]
    if is_conv and dims is None and leaves_out:
        return choice.with_dim(0)
    return choice.with_dim(None if dims is None else dims[block], None if alphas is None else alphas[block])


def _found(choice: Choice, rules: Mapping[str, float], name: str) -> tuple[int, float] | None:
    """The first rule that matches a layer: anywhere in its name in files, or its whole path."""
    for number, (pattern, value) in enumerate(rules.items()):
        try:
            hit = re.search(pattern, choice.lora_name) or re.fullmatch(pattern, choice.path)
        except re.error as error:
            raise OptionError(f"{name}: {pattern!r} is not a regular expression: {error}") from error
        if hit:
            return number, value
    return None


def _by_pattern(choice: Choice, given: Mapping[str, Any]) -> Choice:
    found = _found(choice, given.get("network_reg_dims") or {}, "network_reg_dims")
    if found is None:
        return choice
    if found[1] != int(found[1]):
        raise OptionError(f"network_reg_dims: a rank is a whole number, got {found[1]}")
    return choice.with_dim(int(found[1]))


def _with_rate(choice: Choice, given: Mapping[str, Any]) -> Choice:
    return replace(choice, lr=_found(choice, given.get("network_reg_lrs") or {}, "network_reg_lrs"))


def _split(model: nn.Module, choice: Choice) -> Choice:
    """Queries, keys and values (and what else a fused layer has) apart, each with a rank of its own."""
    if choice.path.rpartition(".")[2] not in _FUSED:
        return choice
    out, width = shape_of(model.get_submodule(choice.path).weight)  # type: ignore[arg-type]
    ends = [0, width, 2 * width, 3 * width, out]
    if out < 3 * width:  # fewer keys and values than queries
        ends = [0, width, (out + width) // 2, out]
    rows = tuple((start, stop) for start, stop in itertools.pairwise(ends) if stop > start)
    return replace(choice, rows=rows)
