"""Who takes part in the race of one layer, on the same tensors: the frozen layer, nerine, by hand, LyCORIS, PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from step_floor import floor
from step_maps import BLOCK, FACTOR, RANK
from step_measure import Contestant, say
from step_peers import peers_of
from step_rows import Problem, Row
from torch import nn

import nerine
from nerine import algorithms

__all__ = ["CACHED", "NERINE", "Contestant", "adapted", "contestants", "frozen", "say"]

CACHED = "nerine cached"

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


def frozen(p: Problem, name: str = "frozen") -> Contestant:
    layer = p.fresh_layer()
    return Contestant(name, layer, modules=[layer])


def contestants(p: Problem, row: Row, peers: bool = True, by_hand: bool = True) -> Iterator[Contestant]:
    """All who have the algorithm of `row` at the layer of `p`, nerine first. By hand there is fp32 alone."""
    yield adapted(p, row)
    if by_hand and p.precision == "fp32":
        tensors = p.leaves(row)
        forward = floor(p, row, tensors)
        if forward is not None:
            trained = {name: t for name, t in tensors.items() if t.requires_grad}
            yield Contestant("by hand", forward, trained, guest=True)
    for name, build in peers_of(p, row) if peers else ():
        try:
            layer, trained, modules = build()
        except Exception as problem:
            yield Contestant(name, peer=True, failure=say(problem), guest=True)
        else:
            yield Contestant(name, layer, trained, peer=True, modules=modules, guest=True)


def adapted(p: Problem, row: Row, cached: bool = False) -> Contestant:
    """nerine on the layer; with `cached` it may keep its changed weight in forwards without gradients."""
    inner = NERINE[row.kind]()
    model = nn.Sequential(p.fresh_layer())
    network = nerine.attach(model, inner if row.axis is None else nerine.DoRA(inner, axis=row.axis))
    tensors = {key.rsplit(".", 1)[-1]: t for key, t in network.named_tensors()}
    values = p.values(row)
    assert tensors.keys() == values.keys(), (sorted(tensors), sorted(values))
    for name, t in tensors.items():
        assert t.requires_grad == (name not in row.map.constant), name
        t.detach().copy_(values[name].reshape(t.shape))
    if cached:
        network.cache(weights=True)
    name = CACHED if cached else "nerine"
    return Contestant(name, model[0], {name: t for name, t in tensors.items() if t.requires_grad}, modules=[model])
