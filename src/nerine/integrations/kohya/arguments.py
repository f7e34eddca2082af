"""The `network_args` of sd-scripts: LyCORIS's, and those that sd-scripts' own networks take for each kind of model."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from nerine.errors import OptionError
from nerine.integrations.arguments import Reader, as_bool, as_float, as_floats, as_int, as_ints, as_pairs, as_text

__all__ = ["ARGUMENTS", "indices"]


def _patterns(name: str, value: Any) -> list[str] | None:
    """Regular expressions: a Python list of texts, or one of them."""
    text = as_text(name, value) if isinstance(value, str) or value is None else None
    if text is None:
        return None if value is None or isinstance(value, str) else [str(entry) for entry in value]
    if text[:1] not in "[('\"":
        return [text]
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise OptionError(f"{name}: expected a list such as ['.*attn.*', '.*mlp.*'], got {value!r}") from None
    return [str(entry) for entry in found] if isinstance(found, list | tuple) else [str(found)]


def _weights(name: str, value: Any) -> list[float] | str | None:
    """Multiples of the learning rate: numbers, or the name of a curve ("sine+0.25")."""
    text = as_text(name, value) if isinstance(value, str) or value is None else None
    if text is None:
        return None if value is None or isinstance(value, str) else as_floats(name, value)
    return text if text[:1].isalpha() else as_floats(name, text)


def _unavailable(name: str, value: Any) -> None:
    if as_float(name, value):
        raise OptionError(f"{name}: noise along the gradient (GGPO) is not offered; leave it out")


def indices(name: str, text: str) -> frozenset[int] | None:
    """The numbers of blocks that "all", "none" or "0-3,7" mean; None is all.

    Raises:
        OptionError: it is nothing of the kind.
    """
    words = text.strip().lower()
    if words == "all":
        return None
    if words in ("none", ""):
        return frozenset()
    found: set[int] = set()
    for part in words.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not first.strip().isdigit() or not last.strip().isdigit() or int(last) < int(first):
            raise OptionError(f"{name}: expected blocks such as all, none or 0-3,7, got {text!r}")
        found.update(range(int(first), int(last) + 1))
    return frozenset(found)


def _blocks(name: str, value: Any) -> str | None:
    """A choice of blocks as text; "none" is a choice."""
    if value is None:
        return None
    indices(name, str(value))
    return str(value)


def _several(kind: Reader, *names: str) -> dict[str, Reader]:
    return dict.fromkeys(names, kind)


ARGUMENTS: Mapping[str, Reader] = {
    "neuron_dropout": as_float,
    "train_t5xxl": as_bool,
    "split_qkv": as_bool,
    "verbose": as_bool,
    **_several(as_float, "loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"),
    # SD 1, 2 and SDXL
    **_several(as_ints, "block_dims", "conv_block_dims"),
    **_several(as_floats, "block_alphas", "conv_block_alphas", "mid_lr_weight"),
    **_several(_weights, "down_lr_weight", "up_lr_weight"),
    "block_lr_zero_threshold": as_float,
    # by regular expression
    "network_reg_dims": as_pairs,
    "network_reg_lrs": as_pairs,
    **_several(_patterns, "exclude_patterns", "include_patterns"),
    # Flux
    **_several(as_int, "img_attn_dim", "txt_attn_dim", "img_mlp_dim", "txt_mlp_dim", "img_mod_dim", "txt_mod_dim"),
    **_several(as_int, "single_dim", "single_mod_dim"),
    **_several(as_ints, "in_dims", "emb_dims", "embedder_dims"),
    "train_blocks": as_text,
    **_several(_blocks, "train_double_block_indices", "train_single_block_indices", "train_block_indices"),
    **_several(_unavailable, "ggpo_beta", "ggpo_sigma"),
    # SD3
    **_several(
        as_int, "context_attn_dim", "context_mlp_dim", "context_mod_dim", "x_attn_dim", "x_mlp_dim", "x_mod_dim"
    ),
    # Lumina
    **_several(as_int, "attn_dim", "mlp_dim", "mod_dim", "refiner_dim"),
}
