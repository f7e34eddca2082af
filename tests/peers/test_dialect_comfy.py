"""Files for ComfyUI, read by ComfyUI's own loader: the weights that it patches are the weights that nerine merges.

Needs a checkout: `NERINE_COMFYUI=/path/to/ComfyUI scripts/test tests/peers/test_dialect_comfy.py`. Only its loader is
run; the module that has all models is replaced by an empty one, because nothing of it is needed.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import nerine
from nerine import BOFT, DiagOFT, DoRA, DyLoRA, FormatError, Full, GLoRA, LoHa, LoKr, LoRA, Norm, TLoRA
from peers.stirred import stir

CHECKOUT = os.environ.get("NERINE_COMFYUI", "")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.no_device_guard,
    pytest.mark.skipif(not CHECKOUT, reason="needs a checkout of ComfyUI at $NERINE_COMFYUI"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class _Models(types.ModuleType):
    """Stands for comfy.model_base: every class that is asked for, and none that anything is an instance of."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__dict__.setdefault(name, type(name, (), {}))


@pytest.fixture(scope="module")
def comfy() -> Iterator[Any]:
    sys.path.insert(0, CHECKOUT)
    try:
        importlib.import_module("comfy.cli_args").args.cpu = True
        sys.modules["comfy.model_base"] = importlib.import_module("comfy").model_base = _Models("comfy.model_base")
        yield importlib.import_module("comfy.lora")
    finally:
        sys.path.remove(CHECKOUT)
        for name in [name for name in sys.modules if name.split(".")[0] == "comfy"]:
            del sys.modules[name]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(24, 30)
        self.square = nn.Linear(16, 16)
        self.conv = nn.Conv2d(12, 20, 3, padding=1)
        self.point = nn.Conv2d(12, 8, 1)
        self.norm = nn.LayerNorm(30)


class Config:
    unet_config: dict[str, Any] = {}  # noqa: RUF012


class Loaded(nn.Module):
    """A model as ComfyUI has it."""

    model_config = Config()

    def __init__(self) -> None:
        super().__init__()
        self.diffusion_model = Model()


def patched(comfy: Any, file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Weights as ComfyUI patches them at strength one, and the keys that it did not load."""
    model = Loaded()
    names: dict[str, str] = {}
    comfy.model_lora_keys_unet(model, names)
    tensors = safetensors.torch.load_file(file)
    found = comfy.load_lora(dict(tensors), names, log_missing=False)
    weights = {}
    for key, t in model.state_dict().items():
        patches = [(1.0, found[key], 1.0, None, None)] if key in found else []
        weights[key.removeprefix("diffusion_model.")] = comfy.calculate_weight(patches, t.clone(), key)
    used = {key for stem in names for key in tensors if key.startswith(f"{stem}.") and names[stem] in found}
    return weights, sorted(set(tensors) - used)


def deviation(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest |got - want| of a weight, against how far it has moved."""
    base = Model().state_dict()
    moved = {key: float((want[key] - t).abs().max()) for key, t in base.items()}
    assert sum(size > 0 for size in moved.values()) >= 1
    return max(float((got[key] - want[key]).abs().max()) / max(moved[key], 1e-3) for key in base)


EVERYWHERE = ["lin", "square", "conv", "point"]
EXACT: dict[str, Any] = {
    "LoRA": LoRA(rank=4, alpha=3),
    "LoRA, Tucker": LoRA(rank=4, alpha=3, tucker=True),
    "LoRA, rs": LoRA(rank=4, alpha=3, rs=True),
    "DyLoRA": DyLoRA(rank=4, alpha=3),
    "T-LoRA": TLoRA(rank=4, alpha=3),
    "LoHa": LoHa(rank=4, alpha=3),
    "LoHa, Tucker": LoHa(rank=4, alpha=3, tucker=True),
    "LoKr": LoKr(rank=2, alpha=3),
    "LoKr, both decomposed": LoKr(rank=1, alpha=3, decompose_both=True),
    "LoKr, Tucker": LoKr(rank=1, alpha=3, tucker=True),
    "LoKr, both full": LoKr(full_matrix=True),
    "GLoRA": GLoRA(rank=4, alpha=3),
    "DoRA over outputs": DoRA(LoRA(rank=4, alpha=3)),
    "DoRA over inputs": DoRA(LoRA(rank=4, alpha=3), axis="in"),
    "DoRA of LoHa": DoRA(LoHa(rank=4, alpha=3)),
    "DoRA of LoKr": DoRA(LoKr(rank=2, alpha=3)),
    "DoRA of T-LoRA": DoRA(TLoRA(rank=4, alpha=3)),
    "DoRA of GLoRA": DoRA(GLoRA(rank=4, alpha=3), axis="in"),
    "Diag-OFT": DiagOFT(block_size=4),
    "Diag-OFT, bounded": DiagOFT(block_size=4, constraint=0.01),
    "BOFT": BOFT(block_size=4),
    "BOFT, bounded and rescaled": BOFT(block_size=4, constraint=0.01, rescale=True),
    "Full": Full(),
}


@pytest.mark.parametrize("case", EXACT)
def test_comfyui_reads_what_nerine_wrote_for_it(comfy: Any, case: str, tmp_path: Path) -> None:
    model = Model()
    network = nerine.attach(model, EXACT[case], targets=EVERYWHERE)
    stir(network.parameters())
    report = nerine.save(network, tmp_path / "a.safetensors", dialect="comfy")
    (row,) = (row for row in report.readers if row.reader == "ComfyUI")
    assert (row.exactly, row.approximately, row.not_at_all) == (4, 0, 0)
    got, unused = patched(comfy, tmp_path / "a.safetensors")
    assert unused == []
    network.merge()
    assert deviation(got, {k: t for k, t in model.state_dict().items() if "nerine" not in k}) < 1e-5


def test_norms(comfy: Any, tmp_path: Path) -> None:
    model = Model()
    network = nerine.attach(model, Norm(), targets="norm")
    stir(network.parameters())
    nerine.save(network, tmp_path / "a.safetensors", dialect="comfy")
    got, unused = patched(comfy, tmp_path / "a.safetensors")
    network.merge()
    assert unused == []
    assert deviation(got, {k: t for k, t in model.state_dict().items() if "nerine" not in k}) < 1e-5


DEVIATING: dict[str, Any] = {
    "DoRA over outputs, as trained": DoRA(LoRA(rank=4, alpha=3)),
    "DoRA of LoKr, as trained": DoRA(LoKr(rank=2, alpha=3)),
    "Diag-OFT, its bound as it is": DiagOFT(block_size=4, constraint=0.01),
    "Diag-OFT, rescaled": DiagOFT(block_size=4, rescale=True),
    "BOFT, its bound as it is": BOFT(block_size=4, constraint=0.01),
}


@pytest.mark.parametrize("case", DEVIATING)
def test_the_deviation_that_is_foretold_is_the_one_that_comes(comfy: Any, case: str, tmp_path: Path) -> None:
    """In the kohya dialect, which holds them as trained, ComfyUI computes something else; the report says how far."""
    model = Model()
    network = nerine.attach(model, DEVIATING[case], targets="lin")
    stir(network.parameters())
    report = nerine.save(network, tmp_path / "a.safetensors", dialect="kohya")
    (row,) = (row for row in report.readers if row.reader == "ComfyUI")
    assert (row.exactly, row.approximately, row.not_at_all) == (0, 1, 0)
    got, unused = patched(comfy, tmp_path / "a.safetensors")
    assert unused == []
    base = model.lin.weight.detach().clone()
    network.merge()
    want = model.lin.weight
    found = float((got["lin.weight"] - want).norm() / (want - base).norm())
    assert row.worst == pytest.approx(found, rel=1e-3)
    assert found > 1e-3


@pytest.mark.parametrize("algorithm", [nerine.IA3(), nerine.OFTv2(block_size=4)], ids=str)
def test_what_comfyui_has_no_reader_for_is_refused(algorithm: Any, tmp_path: Path) -> None:
    network = nerine.attach(Model(), algorithm, targets="lin")
    with pytest.raises(FormatError, match="ComfyUI has no"):
        nerine.save(network, tmp_path / "a.safetensors", dialect="comfy")
