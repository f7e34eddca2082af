"""What each algorithm can be told in LyCORIS's words, read from the settings of nerine's own.

A setting has one word there, or several; those without one cannot be said in a preset. What every layer may be told
(dropouts, the rank, which also brings convolutions back where they are left out) comes on top.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from nerine.algorithms import REGISTRY

__all__ = ["ALGO_REGISTRY", "OPTIONS", "WORDS", "AlgoSpec"]


@dataclass(frozen=True)
class AlgoSpec:
    """An algorithm by its name in LyCORIS, and the options that it understands."""

    name: str
    description: str
    supported_args: tuple[str, ...] = ()
    required_args: tuple[str, ...] = ()
    notes: str | None = None

    def supports(self, arg: str) -> bool:
        return arg in self.supported_args


WORDS: Mapping[str, tuple[str, ...]] = {
    "rank": ("dim", "lora_dim"),
    "alpha": ("alpha",),
    "tucker": ("use_tucker", "use_cp", "use_conv_cp"),
    "scalar": ("use_scalar",),
    "rs": ("rs_lora",),
    "factor": ("factor",),
    "decompose_both": ("decompose_both",),
    "full_matrix": ("full_matrix",),
    "unbalanced": ("unbalanced_factorization",),
    "constraint": ("constraint", "constrain"),
    "rescale": ("rescaled", "rescale"),
    "on_input": ("train_on_input",),
    "min_rank": ("min_rank",),
    "power": ("power",),
}
_OF_ONE: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("dylora", "block_size"): ("block_size",),
    ("tlora", "init"): ("sig_type", "use_data_init"),
    # the rank of a rotation is the size of its blocks
    ("diag-oft", "block_size"): (),
    ("boft", "block_size"): (),
    ("oft-v2", "block_size"): (),
}
_EVERYWHERE = ("dim", "dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "bypass_mode")
_DECOMPOSED = ("dora_wd", "weight_decompose", "wd_on_output", "wd_on_out")
_AXIS = ("wd_on_output", "wd_on_out")

# name in LyCORIS: name in nerine, what it is, further options, notes
_TABLE: Mapping[str, tuple[str, str, tuple[str, ...], str | None]] = {
    "lora": ("lora", "A low-rank product beside the weight.", _DECOMPOSED, None),
    "locon": ("lora", "Another name of lora.", _DECOMPOSED, None),
    "loha": ("loha", "The entrywise product of two low-rank products.", _DECOMPOSED, None),
    "lokr": (
        "lokr",
        "A Kronecker product of two factors.",
        _DECOMPOSED,
        "The second factor is whole where dim is at least half its larger side; with both whole, alpha has no effect.",
    ),
    "dylora": ("dylora", "A low-rank product trained with a random number of its ranks.", (), None),
    "glora": ("glora", "Low-rank changes of the weight and of the layer's input.", (), None),
    "full": ("full", "The whole change of the weight and of the bias.", ("alpha",), "alpha and dim scale nothing."),
    "diag-oft": ("diag-oft", "A rotation of the outputs in blocks.", (), "dim is the most that a block may have."),
    "boft": ("boft", "A butterfly of rotations of the outputs.", (), "dim is the most that a block may have."),
    "ia3": ("ia3", "One factor for each output, or for each input.", (), "The preset ia3 chooses layers for it."),
    "tlora": (
        "tlora",
        "A low-rank product that starts on singular directions and whose rank follows the timestep.",
        ("mask_group_id",),
        "sig_type is principal, middle or last. All ranks take part until set_timestep_mask says otherwise.",
    ),
    "dora": ("lora", "lora with dora_wd.", _AXIS, "Not in LyCORIS."),
    "oft-v2": ("oft-v2", "A rotation of the inputs in blocks.", (), "Not in LyCORIS. dim is the size of a block."),
    "norm": ("norm", "The scale and the offset of a norm.", (), "What train_norm gives to norms."),
}


def _spec(name: str) -> AlgoSpec:
    own, description, more, notes = _TABLE[name]
    words = [
        word
        for setting in dataclasses.fields(REGISTRY[own])
        for word in _OF_ONE.get((own, setting.name), WORDS.get(setting.name, ()))
    ]
    return AlgoSpec(name, description, tuple(dict.fromkeys((*words, *_EVERYWHERE, *more))), (), notes)


ALGO_REGISTRY: Mapping[str, AlgoSpec] = MappingProxyType({name: _spec(name) for name in _TABLE})
OPTIONS: tuple[str, ...] = tuple(sorted({word for spec in ALGO_REGISTRY.values() for word in spec.supported_args}))
