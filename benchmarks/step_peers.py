"""LyCORIS and PEFT on one layer: which of their modules has which algorithm, and under what names its tensors are.

Alpha is such that their scale is one, as it is everywhere here. Where a module of theirs has tensors of another shape
(blocks of another size, fewer stages), it computes another map: it gets as many of the values as there is room for,
and the comparison with the reference says so.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from step_maps import BLOCK, FACTOR, RANK, butterfly_size
from step_rows import Problem, Row
from torch import Tensor, nn

__all__ = ["peers_of", "quiet"]

Built = tuple[nn.Module, dict[str, Tensor], list[nn.Module]]  # the layer, its trained tensors by nerine's names, modes
LOHA = ("w1_a", "w1_b", "w2_a", "w2_b")
WHOLE = 10**6  # a rank for which PEFT's LoKr keeps w2 as one matrix


def peers_of(p: Problem, row: Row) -> Iterator[tuple[str, Callable[[], Built]]]:
    """Names of the peers that have the algorithm of `row`, and what builds them."""
    if row.kind in LYCORIS and (row.axis is None or row.kind in ("lora", "lokr", "loha")):
        yield "LyCORIS", partial(_lycoris, p, row, bypass=False)
    if row.kind in LYCORIS and row.axis is None and row.kind != "full":  # their DoRA and their Full have no bypass mode
        yield "LyCORIS bypass", partial(_lycoris, p, row, bypass=True)
    if row.kind in PEFT and (row.axis is None or (row.axis == "out" and row.kind == "lora")):
        yield "PEFT", partial(_peft, p, row)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The peers print and warn while they are put together."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _fill(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor], constant: tuple[str, ...]) -> dict[str, Tensor]:
    """The trained ones of `tensors`, filled; a tensor of another size gets the values over and over, as far as they
    fit."""
    assert tensors.keys() == values.keys(), (sorted(tensors), sorted(values))
    with torch.no_grad():
        for name, t in tensors.items():
            assert t.requires_grad == (name not in constant), name
            flat = values[name].flatten()
            t.copy_(flat.repeat(-(-t.numel() // len(flat)))[: t.numel()].reshape(t.shape))
    return {name: t for name, t in tensors.items() if t.requires_grad}


def _at(module: Any, path: str) -> Tensor:
    for part in path.split("."):
        module = module[part] if isinstance(module, (nn.ModuleDict, nn.ParameterDict)) else getattr(module, part)
    assert isinstance(module, Tensor), path
    return module


# -- LyCORIS -----------------------------------------------------------------------------------------------------
class Lycoris(NamedTuple):
    """A module of `lycoris.modules`, where it keeps its tensors, and its settings beside the usual ones."""

    module: str
    names: Mapping[str, str]
    settings: Callable[[int], dict[str, Any]] = lambda out: {}


_LORA = {"down": "lora_down.weight", "up": "lora_up.weight"}
_TLORA = {"q": "q_layer.weight", "p": "p_layer.weight", "lambda": "lambda_layer"}
_BASE = {name: name for name in ("base_q", "base_p", "base_lambda")}
LYCORIS: dict[str, Lycoris] = {
    "lora": Lycoris("LoConModule", _LORA),
    "lokr": Lycoris(
        "LokrModule", {"w1": "lokr_w1", "w2": "lokr_w2"}, lambda out: {"factor": FACTOR, "full_matrix": True}
    ),
    "loha": Lycoris("LohaModule", {name: f"hada_{name}" for name in LOHA}),
    # its scale is alpha over the number of blocks drawn, here one block of all ranks
    "dylora": Lycoris(
        "DyLoraModule", {"down": "down_list.0", "up": "up_list.0"}, lambda out: {"block_size": RANK, "alpha": 1}
    ),
    "tlora": Lycoris("TLoraModule", _TLORA | _BASE),
    "glora": Lycoris("GLoRAModule", {name: f"{name}.weight" for name in ("a1", "a2", "b1", "b2")}),
    "full": Lycoris("FullModule", {"diff": "weight", "diff_b": "bias"}),
    "ia3": Lycoris("IA3Module", {"w": "weight"}),
    "ia3-input": Lycoris("IA3Module", {"w_in": "weight"}, lambda out: {"train_on_input": True}),
    "diag-oft": Lycoris("DiagOFTModule", {"blocks": "oft_blocks"}, lambda out: {"lora_dim": BLOCK}),
    "boft": Lycoris("ButterflyOFTModule", {"blocks": "oft_blocks"}, lambda out: {"lora_dim": butterfly_size(out)}),
}


def _lycoris(p: Problem, row: Row, bypass: bool) -> Built:
    from lycoris import modules

    peer = LYCORIS[row.kind]
    settings: dict[str, Any] = {"lora_dim": RANK, "alpha": RANK, "bypass_mode": bypass}
    settings |= peer.settings(p.weight.shape[0])
    names = dict(peer.names)
    if row.axis is not None:
        settings |= {"weight_decompose": True, "wd_on_out": row.axis == "out"}
        names["magnitude"] = "dora_scale"
    layer = p.fresh_layer()
    with quiet():
        module = getattr(modules, peer.module)("step", layer, 1.0, **settings)
        trained = _fill({name: _at(module, path) for name, path in names.items()}, p.values(row), row.map.constant)
        module.apply_to()
    return layer, trained, [layer, module]


# -- PEFT --------------------------------------------------------------------------------------------------------
class Peft(NamedTuple):
    """A config class of `peft`, where its layers keep the tensors, and its settings for a number of outputs."""

    config: str
    names: Mapping[str, str]
    settings: Callable[[int], dict[str, Any]]
    offset: float = 0.0  # what they add to the values


PEFT: dict[str, Peft] = {
    "lora": Peft(
        "LoraConfig",
        {"down": "lora_A.default.weight", "up": "lora_B.default.weight"},
        lambda out: {"r": RANK, "lora_alpha": RANK},
    ),
    "lokr": Peft(
        "LoKrConfig",
        {"w1": "lokr_w1.default", "w2": "lokr_w2.default"},
        lambda out: {"r": WHOLE, "alpha": WHOLE, "decompose_factor": FACTOR},
    ),
    "loha": Peft("LoHaConfig", {name: f"hada_{name}.default" for name in LOHA}, lambda out: {"r": RANK, "alpha": RANK}),
    "ia3": Peft("IA3Config", {"w": "ia3_l.default"}, lambda out: {"feedforward_modules": []}, 1.0),
    "ia3-input": Peft("IA3Config", {"w_in": "ia3_l.default"}, lambda out: {"feedforward_modules": ["0"]}, 1.0),
    # without its CUDA extension it has one stage, whatever it is asked for; its factors of the outputs stay at one
    "boft": Peft(
        "BOFTConfig",
        {"blocks": "boft_R.default"},
        lambda out: {
            "boft_block_size": butterfly_size(out),
            "boft_n_butterfly_factor": (out // butterfly_size(out)).bit_length(),
        },
    ),
    "oft-v2": Peft("OFTConfig", {"upper": "oft_R.default.weight"}, lambda out: {"oft_block_size": BLOCK}),
}


def _peft(p: Problem, row: Row) -> Built:
    import peft

    peer = PEFT[row.kind]
    settings, names = peer.settings(p.weight.shape[0]), dict(peer.names)
    if row.axis is not None:
        settings["use_dora"] = True
        names["magnitude"] = "lora_magnitude_vector.default.weight"
    with quiet():
        config = getattr(peft, peer.config)(target_modules=["0"], **settings)
        model = peft.inject_adapter_in_model(config, nn.Sequential(p.fresh_layer()))
    values = {name: t + peer.offset for name, t in p.values(row).items()}
    trained = _fill({name: _at(model[0], path) for name, path in names.items()}, values, row.map.constant)
    return model[0], trained, [model]
