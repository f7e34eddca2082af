"""A program that uses nerine as another project would; type checkers read it, and it runs.

Every type that a consumer leans on is asserted, so that a public name whose type is lost (or becomes Any) fails here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import nerine
import nerine.tools
from nerine.algorithms.base import Algorithm
from nerine.files.reports import SaveReport
from nerine.model.adapter import Adapter
from nerine.model.plan import Plan
from nerine.model.reports import MergeReport


def model() -> nn.Sequential:
    """Two layers of different widths."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.SiLU(), nn.Linear(20, 6))


def adapted(what: Algorithm | list[nerine.Rule]) -> nerine.Network:
    """A network after one step of training."""
    network = nerine.attach(model(), what, dropout=0.1)
    assert_type(network, nerine.Network)
    assert_type(network.parameters(), Iterator[nn.Parameter])
    optimizer = torch.optim.SGD(network.param_groups(lr=0.1))
    for name, parameter in network.named_parameters():
        assert_type(name, str)
        parameter.data.add_(0.01)
    optimizer.step()
    return network


def kept(network: nerine.Network, file: Path) -> nerine.Network:
    """Saved and read again."""
    report = nerine.save(network, file, dtype=torch.float32)
    assert_type(report, SaveReport)
    again = nerine.load(model(), file, strength=0.5)
    assert_type(again.strength, float)
    assert_type(again.state_dict(), dict[str, Tensor])
    return again


def merged(network: nerine.Network) -> None:
    """Into the base and out of it."""
    with network.paused():
        pass
    assert_type(network.merge(), MergeReport)
    assert_type(network.is_merged, bool)
    network.unmerge()
    for path, name, adapter in network.adapters():
        assert_type((path, name), tuple[str, str])
        assert_type(adapter, Adapter)


def main(folder: Path) -> None:
    inner = nerine.LoKr(rank=4, alpha=2.0)
    assert_type(inner.rank, int)
    rules = [nerine.Rule("0", nerine.DoRA(inner)), nerine.Rule(nn.Linear, nerine.LoRA(rank=2)), nerine.Rule("*", None)]
    assert_type(nerine.plan(model(), rules), Plan)
    for what in (nerine.DoRA(inner), rules):
        merged(kept(adapted(what), folder / "own.safetensors"))
    seen = nerine.tools.inspect(folder / "own.safetensors")
    assert_type(seen, nerine.tools.InspectReport)
    assert_type(seen.healthy, bool)
    try:
        nerine.load(model(), folder / "missing.safetensors")
    except nerine.NerineError as error:
        assert_type(str(error), str)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
