"""What the code and the recorded benchmarks say of an algorithm: tensors, sizes, costs, figures, readers.

Everything here is computed from `nerine` or read from benchmarks/results; no sentence and no look is decided here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from nerine import Norm, plan
from nerine.algorithms import Algorithm, Params
from nerine.files.checkpoint import Record
from nerine.files.dialects import DIALECTS
from nerine.files.readers import READERS
from nerine.integrations.lycoris.algorithms import _TABLE, ALGO_REGISTRY
from nerine.model.plan import PlanRow
from nerine.site import Site

__all__ = [
    "LAYERS",
    "Place",
    "Tensors",
    "dialects",
    "lycoris_names",
    "places",
    "plan_row",
    "quality",
    "readers",
    "started",
    "step_ratios",
    "tensors",
]

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
LINEAR = Site("linear", (640, 320), has_bias=True)
CONV = Site("conv", (640, 320, 3, 3), (1, 1), (1, 1), (1, 1), has_bias=True)
NORM = Site("norm", (640,), has_bias=True)
LAYERS = {  # of the recorded steps, as a page calls them
    "linear-320": "Linear 320, 4,096 tokens",
    "linear-1280": "Linear 1280, 1,024 tokens",
    "linear-3072": "Linear 3072, 2,048 tokens",
    "linear-4096x11008": "Linear 4096 → 11008, 512 tokens",
    "conv-320": "Conv2d 320, 3×3, 32×32 pixels",
    "conv-1280": "Conv2d 1280, 3×3, 16×16 pixels",
    "unet": "a small UNet of SD 1's blocks",
    "block": "a transformer block of SD 3's kind",
}


class Place(NamedTuple):
    """A layer that tables show: what it is called, its site, and how it is made."""

    title: str
    site: Site
    module: nn.Module


class Tensors(NamedTuple):
    """One tensor of an adapter: its name, its key in a file, its axes, how it starts, and its shape in each place."""

    name: str
    key: str
    axes: str
    start: str
    trained: bool
    shapes: tuple[tuple[int, ...] | None, ...]


def places(algorithm: Algorithm) -> tuple[Place, ...]:
    """The layers on which an algorithm is shown: a linear one and a convolution, or a norm."""
    with torch.device("meta"):
        if algorithm.kinds == Norm.kinds:
            return (Place("LayerNorm 640", NORM, nn.LayerNorm(640)),)
        return (
            Place("Linear 320 → 640", LINEAR, nn.Linear(320, 640)),
            Place("Conv2d 320 → 640, 3×3", CONV, nn.Conv2d(320, 640, 3, padding=1)),
        )


def tensors(algorithm: Algorithm) -> list[Tensors]:
    """The tensors with which training starts, by really starting it on random weights."""
    found: dict[str, Tensors] = {}
    shown = places(algorithm)
    for i, place in enumerate(shown):
        design, params = algorithm.design(place.site), started(algorithm, place.site)
        for name, tensor in params.tensors.items():
            spec = design.layout.specs[name]
            first = Tensors(name, spec.key, spec.axes, "", spec.trained, (None,) * len(shown))
            row = found.get(name) or first._replace(start=_start_of(algorithm, name, place.site))
            shapes = (*row.shapes[:i], tuple(tensor.shape), *row.shapes[i + 1 :])
            found[name] = row._replace(shapes=shapes)
    return list(found.values())


def started(algorithm: Algorithm, site: Site, seed: int = 0) -> Params:
    """The fresh adapter beside a random weight, which alone depends on `seed`."""
    weight = torch.empty(site.shape).normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))
    return algorithm.start(site, weight, torch.Generator().manual_seed(0))


def _start_of(algorithm: Algorithm, name: str, site: Site) -> str:
    """What a fresh tensor holds, in words."""
    one, other = (started(algorithm, site, seed).tensors[name] for seed in (0, 1))
    if not torch.equal(one, other):
        return "from the weight"
    design = algorithm.design(site)
    kind, _, value = algorithm.start_of(name, design.layout.specs[name], design).partition(":")
    return f"normal, σ = {value}" if kind == "normal" else {"kaiming": "uniform"}.get(kind, kind)


def plan_row(algorithm: Algorithm, place: Place) -> PlanRow:
    """What `nerine.plan` says of the algorithm on that layer."""
    return plan(nn.Sequential(place.module), algorithm).rows[0]


def lycoris_names(name: str) -> dict[str, tuple[str, ...]]:
    """The names of an algorithm for LyCORIS and in sd-scripts' `network_args`, each with the options it takes."""
    own = {word: "dora" if word == "dora" else of for word, (of, *_) in _TABLE.items()}  # there a name for a LoRA in it
    return {word: ALGO_REGISTRY[word].supported_args for word, of in own.items() if of == name}


def _record(algorithm: Algorithm) -> Record:
    """Such an adapter on the first of its layers (a Tucker core on a convolution), without values."""
    site = CONV if getattr(algorithm, "tucker", False) else places(algorithm)[0].site
    design = algorithm.design(site)
    shapes = {name: torch.empty(shape, device="meta") for name, shape in design.shapes.items()}
    return Record(algorithm, site, Params(shapes, design.scale))


def dialects(algorithm: Algorithm) -> dict[str, str]:
    """Why each dialect cannot hold such an adapter; empty where it can."""
    record = _record(algorithm)
    return {name: dialect.refuses(record) for name, dialect in DIALECTS.items()}


def readers(algorithm: Algorithm) -> dict[str, tuple[str, str]]:
    """For every program: how it reads such an adapter ("exact", "near", "no"), and in which dialect first."""
    record = _record(algorithm)
    able = [dialect for dialect in DIALECTS.values() if not dialect.refuses(record)]
    found = {}
    for reader in READERS:
        levels = {dialect.name: reader.judge(record, dialect).level for dialect in able}
        best = next((level for level in ("exact", "near") if level in levels.values()), "no")
        found[reader.name] = (best, next((d for d, level in levels.items() if level == best != "no"), ""))
    return found


@cache
def _results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def quality(row: str) -> Mapping[str, Any] | None:
    """A row of the measured quality, if it was measured."""
    found: Mapping[str, Any] | None = _results("quality")["rows"].get(row)
    return found


def step_ratios(row: str) -> dict[str, dict[str, float]]:
    """{layer: {contestant: its step over the frozen layer's}} in fp32 and eager; who computes something else is left
    out, and LyCORIS has the faster of its two ways."""
    found: dict[str, dict[str, float]] = {}
    for f in _results("performance")["figures"]:
        is_other = f["note"] or f["contestant"] not in ("nerine", "LyCORIS", "LyCORIS bypass", "PEFT")
        if (f["row"], f["precision"], f["mode"]) != (row, "fp32", "eager") or is_other:
            continue
        of_layer, who = found.setdefault(f["layer"], {}), f["contestant"].removesuffix(" bypass")
        of_layer[who] = min(f["ratio"], of_layer.get(who, f["ratio"]))
    return {layer: found[layer] for layer in LAYERS if layer in found}
