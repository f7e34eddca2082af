"""Train = export = reload in every dialect: what a dialect holds it holds exactly, and what it cannot it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import nerine
from contract.cases import ALGORITHMS, few
from nerine.algorithms import REGISTRY, Algorithm, DoRA
from nerine.errors import FormatError
from nerine.files.dialects import DIALECTS
from nerine.files.reports import SaveReport
from nerine.testing.battery import adapted, close, input_at, layer_at
from nerine.tools import convert

pytestmark = [
    pytest.mark.no_device_guard,  # one device only, and thousands of small operations
    pytest.mark.filterwarnings("ignore:Using padding='same'"),  # torch's, of the base layer
]

EVERYTHING = {f"{around}{name}" for name in REGISTRY for around in ("", "dora-out ", "dora-in ")}
LOW_RANK = {"lora", "dylora", "tlora"}
DORA_LOW_RANK = {f"dora-out {name}" for name in LOW_RANK}
# The algorithms of which each dialect holds at least some layers. Whoever adds one says so here.
HOLDS = {
    "lycoris": EVERYTHING,
    "kohya": EVERYTHING,
    "comfy": {
        *(LOW_RANK | {"loha", "lokr", "glora", "diag-oft", "boft", "full", "norm"}),
        *(f"dora-{axis} {name}" for name in LOW_RANK | {"loha", "lokr", "glora"} for axis in ("out", "in")),
    },
    "bare": EVERYTHING,
    "hcp": EVERYTHING,
    "diffusers": LOW_RANK | DORA_LOW_RANK,
    "peft": LOW_RANK | DORA_LOW_RANK | {"loha", "lokr", "ia3", "oft-v2", "full", "norm"},
    "onetrainer": {"lora", "loha", "lokr", "oft-v2", "dora-out lora", "dora-in lora"},
    "ai-toolkit": LOW_RANK | DORA_LOW_RANK | {"lokr", "full"},
    "invokeai": LOW_RANK | {f"dora-in {name}" for name in LOW_RANK} | {"loha", "lokr", "ia3", "full", "norm"},
}


def name_of(algorithm: Algorithm) -> str:
    return f"dora-{algorithm.axis} {algorithm.inner.name}" if isinstance(algorithm, DoRA) else algorithm.name


def saved(network: nerine.Network, file: Path, dialect: str) -> SaveReport | None:
    """The report of saving, or None where the dialect refuses."""
    try:
        return nerine.save(network, file, dialect=dialect)
    except FormatError as error:
        if "cannot hold" not in str(error):
            raise
        return None


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_a_dialect_holds_an_adapter_exactly_or_refuses_it(algorithm: Algorithm, dialect: str, tmp_path: Path) -> None:
    held = 0
    for number, place in enumerate(few(algorithm)):
        model, network, _ = adapted(algorithm, place)
        file = tmp_path / (f"{number}.safetensors" if not DIALECTS[dialect].folder else str(number))
        report = saved(network, file, dialect)
        if report is None:
            assert not file.exists()
            continue
        held += 1
        assert report.layers == 1
        again = torch.nn.Sequential(layer_at(place)).train(model.training)
        loaded = nerine.load(again, file, strict=True)
        assert loaded.report.dialect in (dialect, "kohya" if dialect == "invokeai" else dialect)
        assert set(loaded.report.used.values()) == {"0"}
        x = input_at(place)
        close(again(x), model(x), f"{algorithm} at {place} in {dialect}", 1e-6)  # scales and alphas are fp32 in files
    assert (held > 0) == (name_of(algorithm) in HOLDS[dialect]) or (
        held == 0 and f"{dialect} {algorithm}" in REFUSED
    ), f"{dialect}: {held} places for {algorithm}"


# Variants that no layer of the battery lets a dialect hold, though it holds the algorithm.
REFUSED = {"onetrainer OFTv2(block_size=3, terms=0)"}
REFUSED |= {f"comfy {a}" for a in ALGORITHMS if "DiagOFT" in str(a) and "rescale" in str(a)}


@pytest.mark.parametrize("target", DIALECTS)
@pytest.mark.parametrize("source", DIALECTS)
def test_every_dialect_converts_into_every_other(source: str, target: str, tmp_path: Path) -> None:
    """A LoRA, which all of them hold, from file to file without a model."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.block = torch.nn.ModuleDict({"lin": torch.nn.Linear(8, 6), "conv": torch.nn.Conv2d(4, 6, 3)})

    model = Model()
    network = nerine.attach(model, nerine.LoRA(rank=2, alpha=3.0))
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    files = [tmp_path / (f"{i}{'' if DIALECTS[d].folder else '.safetensors'}") for i, d in enumerate((source, target))]
    nerine.save(network, files[0], dialect=source)
    report = convert(files[0], files[1], dialect=target)
    assert (report.read.dialect, report.written.dialect) == (source if source != "invokeai" else "invokeai", target)
    again = Model()
    nerine.load(again, files[1], strict=True)
    network.merge()
    nerine.Network.of(again).merge()
    for layer in ("lin", "conv"):
        close(again.block[layer].weight, model.block[layer].weight, f"{source} -> {target}: {layer}", 1e-6)
