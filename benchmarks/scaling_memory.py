"""Bytes and seconds of fine-tuning a transformer of FLUX.1-dev's shape, from counts of one block and `nerine.plan`.

`kept_by_formula` is the arithmetic of activations in closed form; the counts of `scaling_counts` are what it is checked
against. Nothing here runs a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from scaling_counts import Adapt, Counts, Shape, flux, from_plain
from scaling_pipeline import Block, Machine
from torch import nn

import nerine
from nerine.algorithms import REGISTRY, Algorithm

__all__ = ["ALGORITHMS", "ALL", "FROZEN", "GIB", "KEEPS", "RANK", "Job", "Size", "adapt", "job", "kept_by_formula"]

GIB = 2.0**30
RANK = 16
ALL, FROZEN = "all weights", "frozen layers"
RESERVE = 1.5 * GIB  # what the driver, cuBLAS and the allocator take: by assumption
WORKING = 12  # sequences of the model's width that live at once within a block's backward, beside what is kept
HALF, SINGLE = 2, 4  # bytes
# Bytes kept for each weight of a quantised layer, beside the activations: dequantised where a product of torch's own
# keeps it (fp8 of an ordinary layer; bitsandbytes makes it again), and by algorithms that use it once more. Measured on
# the CPU with small layers. DoRA(LoKr) keeps 1/c of it in fp32, and c is 48 for 3072 inputs.
DEQUANTISED = {"bf16": 0.0, "fp8": 2.0, "nf4": 0.0}
USED_AGAIN = {"OFTv2": 2.0, "DoRA(LoKr)": 4 / 48}
# Under checkpointing nerine leaves to torch what is kept of the block that is computed again: fp32 weights of it too.
IN_BLOCK = {"OFTv2": 2.0, "GLoRA": 4.0, "DoRA(LoRA)": 4.0, "DoRA(LoKr)": 4.0, "DoRA(LoHa)": 4.0}
STATE = 4 * SINGLE  # value, gradient and the two averages of AdamW, in fp32


def _algorithms() -> dict[str, Algorithm]:
    plain = [kind(rank=RANK) if "rank" in kind.__dataclass_fields__ else kind() for kind in REGISTRY.values()]
    found: dict[str, Algorithm] = {type(algorithm).__name__: algorithm for algorithm in plain}
    return found | {f"DoRA({name})": nerine.DoRA(found[name]) for name in ("LoRA", "LoKr", "LoHa")}


ALGORITHMS = _algorithms()


def adapt(name: str) -> Adapt:
    """What makes a frozen model one that learns; of `FROZEN` only biases before the first block do, so that gradients
    flow through all layers."""
    if name == FROZEN:
        return _inlets
    if name == ALL:
        return lambda model: model.requires_grad_(True)
    return lambda model: nerine.attach(model, ALGORITHMS[name])


def _inlets(model: Any) -> None:
    inlets = (model.x_embedder, model.context_embedder, model.time_text_embed.timestep_embedder.linear_2)
    for inlet in inlets:
        inlet.bias.requires_grad_(True)


@dataclass(frozen=True)
class Keeps:
    """What an algorithm on linear layers keeps: their inputs, their outputs, and so many values a token and layer."""

    x: int = 1
    y: int = 0
    ranks: int = 0


KEEPS: Mapping[str, Keeps] = {
    FROZEN: Keeps(x=0),
    ALL: Keeps(),
    "LoRA": Keeps(ranks=RANK),
    "LoHa": Keeps(ranks=RANK**2),
    "LoKr": Keeps(),
    "DyLoRA": Keeps(ranks=RANK),
    "TLoRA": Keeps(ranks=2 * RANK),
    "GLoRA": Keeps(ranks=2 * RANK),
    "Full": Keeps(),
    "IA3": Keeps(x=0, y=1),
    "DiagOFT": Keeps(x=0, y=1),
    "BOFT": Keeps(x=0, y=1),
    "OFTv2": Keeps(),
    "DoRA(LoRA)": Keeps(y=1, ranks=RANK),
    "DoRA(LoKr)": Keeps(y=1),
    "DoRA(LoHa)": Keeps(y=1, ranks=RANK**2),
}
# In sequences of the model's width: what a block keeps whoever learns, the inputs of its linear layers that are not
# among that, their outputs that are not, and how many linear layers a token passes.
DOUBLE, ONE = (16, 6, 9, 6), (13, 6, 8, 5)


def kept_by_formula(shape: Shape, keeps: Keeps) -> tuple[float, float]:
    """Bytes that a double and a single block keep for backward in bf16, on CUDA, without what has no tokens."""
    tokens = shape.image + shape.text
    double, single = (
        tokens * HALF * ((base + x * keeps.x + y * keeps.y) * shape.width + layers * keeps.ranks)
        for base, x, y, layers in (DOUBLE, ONE)
    )
    return double, single


@dataclass(frozen=True)
class Size:
    """How large a part of the model is: values of the base, of those in linear layers of blocks and their rows, and of
    the adapters (trained, and kept fixed)."""

    base: float = 0
    linear: float = 0
    rows: float = 0
    trained: float = 0
    fixed: float = 0

    def __add__(self, other: Size) -> Size:
        return Size(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    def times(self, n: float) -> Size:
        return Size(*(getattr(self, f) * n for f in self.__dataclass_fields__))

    def weights(self, how: str) -> float:
        """Bytes of the frozen base as `nerine train` has it."""
        each = {"bf16": HALF, "fp8": 1, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}[how]
        scales = SINGLE * self.rows if how == "fp8" else 0
        return (self.base - self.linear) * HALF + self.linear * each + scales


@cache
def _model() -> nn.Module:
    shape = Shape()
    model: nn.Module = flux(shape, shape.double, shape.single)
    return model


def part_of(path: str) -> str:
    head, _, rest = path.partition(".")
    kind = {"transformer_blocks": "double", "single_transformer_blocks": "single"}.get(head)
    return "rest" if kind is None else kind if rest.split(".")[0] == "0" else ""


@cache
def size_of(name: str) -> dict[str, Size]:
    """Sizes of a double block, a single block and the rest; for the shape of FLUX.1-dev, exact."""
    found = {"double": Size(), "single": Size(), "rest": Size()}
    for path, parameter in _model().named_parameters():
        if part := part_of(path):
            n = parameter.numel()
            is_linear = parameter.dim() == 2 and part != "rest"
            trained = n if name == ALL else 0
            found[part] += Size(n, n * is_linear, parameter.shape[0] * is_linear, trained)
    if name in ALGORITHMS:
        for row in nerine.plan(_model(), ALGORITHMS[name]).rows:
            if part := part_of(row.layer):
                every = sum(math.prod(shape) for shape in row.tensors.values())
                found[part] += Size(trained=row.params, fixed=every - row.params)
    return found


@dataclass(frozen=True)
class Job:
    """One algorithm on the whole model: what it takes of memory, of the network and of time."""

    name: str
    counts: Mapping[str, Counts]
    shape: Shape = field(default_factory=Shape)

    @property
    def size(self) -> Size:
        parts = size_of(self.name)
        return parts["double"].times(self.shape.double) + parts["single"].times(self.shape.single) + parts["rest"]

    @property
    def whole(self) -> Counts:
        parts = self.counts
        return parts["double"].times(self.shape.double) + parts["single"].times(self.shape.single) + parts["rest"]

    @property
    def blocks_kept(self) -> float:
        """Bytes that all blocks keep for backward."""
        return self.shape.double * self.counts["double"].kept + self.shape.single * self.counts["single"].kept

    def blocks_by_formula(self, keeps: Keeps) -> float:
        double, single = kept_by_formula(self.shape, keeps)
        return self.shape.double * double + self.shape.single * single

    @property
    def sequence(self) -> float:
        """Bytes of one value of the model's width for each token."""
        return (self.shape.image + self.shape.text) * self.shape.width * HALF

    @property
    def state(self) -> float:
        """Bytes of values, gradients and averages; all weights need another copy in bf16 to compute with."""
        extra = HALF * self.size.trained if self.name == ALL else 0
        return STATE * self.size.trained + SINGLE * self.size.fixed + extra

    def activations(self, checkpointing: bool) -> float:
        """Bytes kept for backward at the peak; with checkpointing each block's input, and one block at a time."""
        if not checkpointing:
            return self.whole.kept + WORKING * self.sequence
        blocks = self.shape.double + self.shape.single
        return (blocks + WORKING) * self.sequence + self.counts["double"].kept + self.counts["rest"].kept

    def memory(self, weights: str, checkpointing: bool) -> float:
        """Bytes on a GPU that has the whole model."""
        base = 0.0 if self.name == ALL else self.size.weights(weights)
        again = 0.0
        if weights != "bf16":
            each = (IN_BLOCK if checkpointing else USED_AGAIN).get(self.name, 0.0) + DEQUANTISED[weights]
            again = each * (size_of(self.name)["double"] if checkpointing else self.size).linear
        return base + self.state + self.activations(checkpointing) + again + RESERVE

    def sharded(self, shares: int, checkpointing: bool) -> float:
        """Bytes on one of so many GPUs under FSDP2: its share, two whole blocks, and what is not in blocks."""
        base = 0.0 if self.name == ALL else self.size.weights("bf16")
        state = STATE * self.size.trained + SINGLE * self.size.fixed
        parts = size_of(self.name)
        whole = 2 * self._gathered(parts["double"]) + self._gathered(parts["rest"])
        return (base + state) / shares + whole + self.activations(checkpointing) + RESERVE

    def _gathered(self, size: Size) -> float:
        adapters = 0.0 if self.name == ALL else SINGLE * (size.trained + size.fixed)
        return HALF * size.base + adapters

    # -- the network -----------------------------------------------------------------------------------------------
    def ddp_traffic(self, n: int) -> float:
        """Bytes that each GPU sends in a step: an all-reduce of the gradients."""
        return 2 * (n - 1) / n * SINGLE * self.size.trained

    def fsdp_traffic(self, shares: int) -> float:
        """Blocks are gathered twice, the rest once; gradients are scattered."""
        parts = size_of(self.name)
        once = self._gathered(parts["rest"])
        blocks = (
            self._gathered(parts["double"]) * self.shape.double + self._gathered(parts["single"]) * self.shape.single
        )
        return (shares - 1) / shares * (once + 2 * blocks + SINGLE * self.size.trained)

    # -- time ------------------------------------------------------------------------------------------------------
    def blocks(self, machine: Machine, checkpointing: bool) -> list[Block]:
        """The units in the order of the forward; the rest stands before the blocks."""
        parts = size_of(self.name)

        def block(kind: str, again: bool) -> Block:
            counts, size = self.counts[kind], parts[kind]
            forward, backward = (machine.seconds(w.flops, w.bytes) for w in (counts.forward, counts.backward))
            return Block(forward, backward + forward * again, self._gathered(size), SINGLE * size.trained)

        double, single = block("double", checkpointing), block("single", checkpointing)
        return [block("rest", False), *[double] * self.shape.double, *[single] * self.shape.single]

    def optimiser(self, machine: Machine) -> float:
        """Seconds of AdamW on all values: seven passes over fp32."""
        return 7 * SINGLE * self.size.trained / machine.memory

    def device(self, machine: Machine, checkpointing: bool) -> float:
        """Seconds that a GPU computes for a step."""
        passes = sum(b.forward + b.backward for b in self.blocks(machine, checkpointing))
        return passes + self.optimiser(machine)

    def operations(self, base: Job, checkpointing: bool) -> float:
        """Kernels of a step that are the adapters'."""
        mine, theirs = self.whole, base.whole
        forward = max(0.0, mine.forward.kernels - theirs.forward.kernels)
        return forward * (1 + checkpointing) + max(0.0, mine.backward.kernels - theirs.backward.kernels)


def job(name: str, counts: Mapping[str, Any]) -> Job:
    """From counts as they were recorded."""
    return Job(name, {part: from_plain(values) for part, values in counts.items()})
