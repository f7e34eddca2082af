"""Who takes part in `step.py`: the frozen layer, nerine, the floor by hand, LyCORIS and PEFT, on the same tensors."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from step_floor import floor
from step_rows import FACTOR, RANK, Problem, Row
from torch import Tensor, nn

import nerine

__all__ = ["Contestant", "contestants", "frozen"]


@dataclass
class Contestant:
    """A forward, and its trained tensors by nerine's names."""

    name: str
    forward: Callable[[Tensor], Tensor]
    trained: Mapping[str, Tensor] = field(default_factory=dict)


def frozen(p: Problem, name: str = "frozen") -> Contestant:
    return Contestant(name, p.fresh_layer())


def contestants(p: Problem, row: Row, peers: bool = True) -> Iterator[Contestant]:
    """All who have the algorithm of `row` at the layer of `p`, nerine first."""
    yield _nerine(p, row)
    tensors = {name: t.requires_grad_() for name, t in p.values(row).items()}
    yield Contestant("by hand", floor(p, row, tensors), tensors)
    if peers:
        with _quiet():
            yield _lycoris(p, row, bypass=False)
            if row.axis is None:  # its DoRA has no bypass mode
                yield _lycoris(p, row, bypass=True)
            if row.axis != "in" and (row.axis is None or row.kind == "lora"):
                yield _peft(p, row)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The peers print and warn while they are put together."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _fill(trained: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    assert trained.keys() == values.keys(), (sorted(trained), sorted(values))
    with torch.no_grad():
        for name, t in trained.items():
            assert t.requires_grad, name
            t.copy_(values[name].reshape(t.shape))


def _nerine(p: Problem, row: Row) -> Contestant:
    inner = {
        "lora": nerine.LoRA(rank=RANK),
        "lokr": nerine.LoKr(factor=FACTOR, full_matrix=True),
        "loha": nerine.LoHa(rank=RANK),
    }[row.kind]
    algorithm = inner if row.axis is None else nerine.DoRA(inner, axis=row.axis)
    model = nn.Sequential(p.fresh_layer())
    network = nerine.attach(model, algorithm)
    trained = {key.rsplit(".", 1)[-1]: t for key, t in network.named_parameters()}
    _fill(trained, p.values(row))
    return Contestant("nerine", model[0], trained)


def _lycoris(p: Problem, row: Row, bypass: bool) -> Contestant:
    from lycoris.modules import LoConModule, LohaModule, LokrModule

    settings: dict[str, Any] = {"lora_dim": RANK, "alpha": RANK, "bypass_mode": bypass}
    if row.axis is not None:
        settings |= {"weight_decompose": True, "wd_on_out": row.axis == "out"}
    layer = p.fresh_layer()
    if row.kind == "lora":
        module = LoConModule("step", layer, 1.0, **settings)
        names = {"down": "lora_down.weight", "up": "lora_up.weight"}
    elif row.kind == "lokr":
        module = LokrModule("step", layer, 1.0, **settings, factor=FACTOR, full_matrix=True)
        names = {"w1": "lokr_w1", "w2": "lokr_w2"}
    else:
        module = LohaModule("step", layer, 1.0, **settings)
        names = {name: f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    if row.axis is not None:
        names["magnitude"] = "dora_scale"
    module.apply_to()
    trained = {name: _at(module, path) for name, path in names.items()}
    _fill(trained, p.values(row))
    return Contestant("LyCORIS bypass" if bypass else "LyCORIS", layer, trained)


def _peft(p: Problem, row: Row) -> Contestant:
    from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model

    if row.kind == "lora":
        config: Any = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], use_dora=row.axis is not None)
        names = {"down": "lora_A.default.weight", "up": "lora_B.default.weight"}
    elif row.kind == "lokr":
        whole = 10**6  # a rank for which it keeps w2 as one matrix
        config = LoKrConfig(r=whole, alpha=whole, decompose_factor=FACTOR, target_modules=["0"])
        names = {"w1": "lokr_w1.default", "w2": "lokr_w2.default"}
    else:
        config = LoHaConfig(r=RANK, alpha=RANK, target_modules=["0"])
        names = {name: f"hada_{name}.default" for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    if row.axis is not None:
        names["magnitude"] = "lora_magnitude_vector.default.weight"
    model = inject_adapter_in_model(config, nn.Sequential(p.fresh_layer()))
    trained = {name: _at(model[0], path) for name, path in names.items()}
    _fill(trained, p.values(row))
    return Contestant("PEFT", model[0], trained)


def _at(module: Any, path: str) -> Tensor:
    for part in path.split("."):
        module = module[part] if isinstance(module, (nn.ModuleDict, nn.ParameterDict)) else getattr(module, part)
    assert isinstance(module, Tensor), path
    return module
