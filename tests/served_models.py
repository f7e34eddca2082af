"""Adapters in files for the tests of serving, every tensor of them moved from where it starts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import nerine
from nerine.algorithms import REGISTRY, Algorithm

PLAIN: Mapping[str, Algorithm] = {
    name: kind(**({"rank": 3} if "rank" in kind.__dataclass_fields__ else {}))
    for name, kind in REGISTRY.items()
    if name != "norm"
}
MORE: Mapping[str, Algorithm] = {
    "lora-5": nerine.LoRA(rank=5, alpha=2.0),
    "pissa": nerine.LoRA(rank=2, init="pissa"),
    "ia3-in": nerine.IA3(on_input=True),
    "lokr-full": nerine.LoKr(factor=2, full_matrix=True),
}
AROUND: Mapping[str, Algorithm] = {
    f"dora {name}": nerine.DoRA(algorithm) for name, algorithm in {**PLAIN, **MORE}.items()
}
AROUND_INPUTS: Mapping[str, Algorithm] = {
    f"dora-in {name}": nerine.DoRA(PLAIN[name], axis="in") for name in ("lora", "lokr", "ia3", "diag-oft")
}
ALL = {**PLAIN, **MORE, **AROUND, **AROUND_INPUTS}


def write(model: nn.Module, algorithm: Algorithm, file: Path, seed: int = 0, targets: object = "") -> Path:
    """A file with a trained adapter for all layers of `model`, which is left alone."""
    rng = torch.Generator().manual_seed(seed)
    network = nerine.attach(copy.deepcopy(model), algorithm, targets=targets or (lambda path, module: True))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype) * 0.3)
    nerine.save(network, file)
    return file


def alone(model: nn.Module, files: Mapping[Path, float], x: Tensor) -> Tensor:
    """The output of a copy of `model` with these files attached by `nerine.load`."""
    model = copy.deepcopy(model)
    for number, (file, strength) in enumerate(files.items()):
        nerine.load(model, file, name=f"n{number}", strength=strength)
    with torch.no_grad():
        y: Tensor = model(x)
    return y
