"""Who takes part in `step.py`: the frozen layer, nerine, the floor by hand, LyCORIS and PEFT, on the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from step_floor import floor
from step_maps import BLOCK, FACTOR, RANK
from step_peers import peers_of
from step_rows import Problem, Row
from torch import Tensor, nn

import nerine
from nerine import algorithms

__all__ = ["Contestant", "contestants", "frozen", "say"]

# DyLoRA draws a block of ranks in every step; one block of all ranks makes the steps alike. The work is the same.
NERINE: dict[str, Callable[[], algorithms.Algorithm]] = {
    "lora": lambda: algorithms.LoRA(rank=RANK),
    "lokr": lambda: algorithms.LoKr(factor=FACTOR, full_matrix=True),
    "loha": lambda: algorithms.LoHa(rank=RANK),
    "dylora": lambda: algorithms.DyLoRA(rank=RANK, block_size=RANK),
    "tlora": lambda: algorithms.TLoRA(rank=RANK),
    "glora": lambda: algorithms.GLoRA(rank=RANK),
    "full": lambda: algorithms.Full(),
    "ia3": lambda: algorithms.IA3(),
    "ia3-input": lambda: algorithms.IA3(on_input=True),
    "diag-oft": lambda: algorithms.DiagOFT(block_size=BLOCK),
    "boft": lambda: algorithms.BOFT(block_size=BLOCK),
    "oft-v2": lambda: algorithms.OFTv2(block_size=BLOCK),
}


@dataclass
class Contestant:
    """A forward, and its trained tensors by nerine's names; or why there is none."""

    name: str
    forward: Callable[[Tensor], Tensor] | None = None
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    peer: bool = False
    failure: str = ""


def say(problem: Exception) -> str:
    """What went wrong, short enough for a table."""
    lines = str(problem).replace("|", "/").splitlines() or [""]
    return f"fails: {type(problem).__name__}: {lines[0].rstrip()[:100]}"


def frozen(p: Problem, name: str = "frozen") -> Contestant:
    return Contestant(name, p.fresh_layer())


def contestants(p: Problem, row: Row, peers: bool = True) -> Iterator[Contestant]:
    """All who have the algorithm of `row` at the layer of `p`, nerine first."""
    yield _nerine(p, row)
    tensors = p.leaves(row)
    by_hand = floor(p, row, tensors)
    if by_hand is not None:
        yield Contestant("by hand", by_hand, {name: t for name, t in tensors.items() if t.requires_grad})
    for name, build in peers_of(p, row) if peers else ():
        try:
            forward, trained = build()
        except Exception as problem:
            yield Contestant(name, peer=True, failure=say(problem))
        else:
            yield Contestant(name, forward, trained, peer=True)


def _nerine(p: Problem, row: Row) -> Contestant:
    inner = NERINE[row.kind]()
    model = nn.Sequential(p.fresh_layer())
    network = nerine.attach(model, inner if row.axis is None else nerine.DoRA(inner, axis=row.axis))
    tensors = {key.rsplit(".", 1)[-1]: t for key, t in network.named_tensors()}
    values = p.values(row)
    assert tensors.keys() == values.keys(), (sorted(tensors), sorted(values))
    for name, t in tensors.items():
        assert t.requires_grad == (name not in row.map.constant), name
        t.detach().copy_(values[name].reshape(t.shape))
    return Contestant("nerine", model[0], {name: t for name, t in tensors.items() if t.requires_grad})
