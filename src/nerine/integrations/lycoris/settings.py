"""LyCORIS's words for an adapter (`algo`, `dim`, `dora_wd`, `wd_on_output`, ...) and the algorithm that they mean.

What LyCORIS decides for each layer (block sizes of OFT and BOFT) is decided here as it does, so that a file of its has
the shapes that an adapter made with the same words has.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from nerine.algorithms import (
    BOFT,
    IA3,
    Algorithm,
    DiagOFT,
    DoRA,
    DyLoRA,
    Full,
    GLoRA,
    LoHa,
    LoKr,
    LoRA,
    Norm,
    OFTv2,
    TLoRA,
)
from nerine.errors import OptionError, nearest
from nerine.integrations.arguments import Reader, as_bool, as_float, as_int, as_text, parse, renamed
from nerine.ops.kron import factorize
from nerine.site import Site

__all__ = [
    "ALGORITHMS",
    "DEPRECATED",
    "LAYER_NAMES",
    "LAYER_OPTIONS",
    "algorithm_for",
    "current",
    "ignores",
    "layer_options",
    "logger",
    "noise_of",
]

logger = logging.getLogger("nerine")

ALGORITHMS = (
    "lora",
    "locon",
    "loha",
    "lokr",
    "dylora",
    "glora",
    "full",
    "diag-oft",
    "boft",
    "ia3",
    "tlora",
    "oft-v2",
    "norm",
    "dora",
)
_DECOMPOSED = ("lora", "locon", "loha", "lokr")  # what LyCORIS's `dora_wd` acts on

DEPRECATED = {"use_cp": "use_tucker", "use_conv_cp": "use_tucker", "constrain": "constraint"}
_SAME = {"weight_decompose": "dora_wd", "wd_on_out": "wd_on_output", "rescale": "rescaled", "lora_dim": "dim"}


def _algorithm(name: str, value: Any) -> str | None:
    """The name of an algorithm.

    Raises:
        OptionError: there is none of that name.
    """
    text = as_text(name, value)
    if text is not None and text.lower() not in ALGORITHMS:
        raise OptionError(f"{name}: no algorithm is called {text!r}. {nearest(text.lower(), ALGORITHMS)}")
    return None if text is None else text.lower()


LAYER_OPTIONS: Mapping[str, Reader] = {
    "algo": _algorithm,
    "dim": as_int,
    "alpha": as_float,
    "dropout": as_float,
    "rank_dropout": as_float,
    "module_dropout": as_float,
    "rank_dropout_scale": as_bool,
    "use_tucker": as_bool,
    "use_scalar": as_bool,
    "rs_lora": as_bool,
    "block_size": as_int,
    "constraint": as_float,
    "rescaled": as_bool,
    "dora_wd": as_bool,
    "wd_on_output": as_bool,
    "full_matrix": as_bool,
    "decompose_both": as_bool,
    "factor": as_int,
    "unbalanced_factorization": as_bool,
    "train_on_input": as_bool,
    "bypass_mode": as_bool,
    "sig_type": as_text,
    "use_data_init": as_bool,
    "mask_group_id": as_int,
    "min_rank": as_int,
    "power": as_float,
}
LAYER_NAMES = {**DEPRECATED, **_SAME}


def layer_options(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of one layer or kind of layer, each under its name of today and read by its kind.

    Raises:
        OptionError: an unknown name, or a value that cannot be read.
    """
    return parse(current({_SAME.get(key, key): value for key, value in given.items()}), LAYER_OPTIONS, where)


def current(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments under their names of today, with a warning for those of the past."""
    values = dict(given)
    if as_bool("disable_conv_cp", values.pop("disable_conv_cp", False)):
        values["use_tucker"] = False  # LyCORIS turns it on by this
    return renamed(values, DEPRECATED)


def noise_of(options: Mapping[str, Any]) -> dict[str, float]:
    """The three dropouts, for `Noise`."""
    return {name: options.get(name) or 0.0 for name in ("dropout", "rank_dropout", "module_dropout")}


def algorithm_for(options: Mapping[str, Any], site: Site) -> Algorithm:
    """The algorithm that parsed `options` mean for a layer.

    Raises:
        OptionError: a value out of range.
    """
    name = options.get("algo") or "lora"
    inner = _plain("lora" if name == "dora" else name, options, site)
    wanted = bool(options.get("dora_wd")) or name == "dora"
    if not wanted or name not in (*_DECOMPOSED, "dora"):
        return inner
    return DoRA(inner, axis="out" if options.get("wd_on_output", True) else "in")


def ignores(options: Mapping[str, Any]) -> str:
    """What of the options has no effect on this algorithm, in words; LyCORIS says nothing there."""
    name = options.get("algo") or "lora"
    if options.get("dora_wd") and name not in (*_DECOMPOSED, "dora"):
        return f"dora_wd has no effect on {name}, as in LyCORIS; it acts on {', '.join(_DECOMPOSED)}"
    return ""


def _plain(name: str, options: Mapping[str, Any], site: Site) -> Algorithm:
    dim, alpha = options.get("dim") or 4, options.get("alpha") or None  # an alpha of zero means the rank
    ranked: dict[str, Any] = {"rank": dim, "alpha": alpha, "rs": bool(options.get("rs_lora"))}
    shaped = {
        **ranked,
        "tucker": bool(options.get("use_tucker")),
        "scalar": bool(options.get("use_scalar")),
    }
    turned: dict[str, Any] = {"constraint": options.get("constraint") or 0.0, "rescale": bool(options.get("rescaled"))}
    if name in ("lora", "locon"):
        return LoRA(**shaped)
    if name == "loha":
        return LoHa(**shaped)
    if name == "lokr":
        return LoKr(
            **shaped,
            factor=-1 if options.get("factor") is None else options["factor"],
            decompose_both=bool(options.get("decompose_both")),
            full_matrix=bool(options.get("full_matrix")),
            unbalanced=bool(options.get("unbalanced_factorization")),
        )
    if name == "dylora":
        return DyLoRA(**ranked, block_size=_blocks(dim, options))
    if name == "glora":
        return GLoRA(**ranked)
    if name == "tlora":
        return _tlora(options, ranked)
    if name == "diag-oft":
        return DiagOFT(**turned, block_size=max(factorize(site.shape[0], dim)[0], 1))
    if name == "boft":
        return BOFT(**turned, block_size=_butterfly(site.shape[0], dim))
    if name == "oft-v2":
        return OFTv2(block_size=dim)
    return {"full": Full, "norm": Norm}[name]() if name != "ia3" else IA3(on_input=bool(options.get("train_on_input")))


def _blocks(dim: int, options: Mapping[str, Any]) -> int:
    size: int = options.get("block_size") or 4
    if dim % size:
        raise OptionError(f"block_size: expected a divisor of the rank {dim}, got {size}")
    return size


def _tlora(options: Mapping[str, Any], ranked: Mapping[str, Any]) -> Algorithm:
    init = (options.get("sig_type") or "principal") if options.get("use_data_init", True) else "random"
    return TLoRA(
        **ranked,
        init=init,
        min_rank=options.get("min_rank") or 1,
        power=options.get("power") or 1.0,
    )


def _butterfly(out: int, most: int) -> int:
    """The largest even size of blocks up to `most` of which `out` outputs have a power of two; the smallest there is
    where all are larger."""
    sizes = [size for size in range(2, out + 1, 2) if out % size == 0 and (out // size).bit_count() == 1]
    fitting = [size for size in sizes if size <= most]
    return max(fitting) if fitting else min(sizes, default=most)
