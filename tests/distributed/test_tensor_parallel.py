"""Tensor parallel layers (`parallelize_module`) with adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import nerine
from nerine import DoRA, DyLoRA, LoKr, LoRA
from nerine.errors import OptionError
from nerine.testing.battery import close
from small_world import ALGORITHMS, alone, attached, batch, copied, loss_of, model, stir, train
from two_processes import Failures, the_mesh

PLAN = {
    "blocks.0.up": ColwiseParallel(),
    "blocks.0.down": RowwiseParallel(),
    "blocks.1.up": ColwiseParallel(),
    "blocks.1.down": RowwiseParallel(),
    "head": ColwiseParallel(output_layouts=Replicate()),
}


def parallel(**more: object) -> nn.Module:
    base = model()
    return parallelize_module(base, the_mesh(), {**PLAN, **more})  # type: ignore[dict-item]


def same_on_both(network: nerine.Network) -> None:
    for key, t in copied(network).items():
        other = t.clone()
        dist.broadcast(other, 0)
        assert torch.equal(t, other), f"{key} differs between the processes"


def equal_to_one_process(rank: int, folder: Path) -> None:
    failures = Failures()
    for number, algorithm in enumerate(a for a in ALGORITHMS if getattr(a, "inner", a).name != "norm"):
        with failures.case(algorithm):
            losses, want = alone(algorithm, targets=nn.Linear)
            base, network = attached(algorithm, parallel(), targets=nn.Linear)
            stir(network)
            got = train(base, network.parameters())
            same_on_both(network)
            if getattr(algorithm, "inner", algorithm).name != "dylora":  # its draws come from a seed of their own
                close(torch.tensor(got), torch.tensor(losses), "losses")
                for key, tensor in copied(network).items():
                    close(tensor, want[key], key)
            if number % 3 == 0:
                files_and_merging(algorithm, base, network, folder / f"{number}")
    failures.tell()


def files_and_merging(algorithm: object, base: nn.Module, network: nerine.Network, file: Path) -> None:
    nerine.save(network, file)
    other, single = attached(algorithm, targets=nn.Linear)  # type: ignore[arg-type]
    single.load_state_dict(copied(network))
    nerine.save(single, mine := file.with_suffix(f".{dist.get_rank()}"))
    assert file.read_bytes() == mine.read_bytes()
    nerine.load(network, file)
    before = {key: p.full_tensor().clone() for key, p in base.named_parameters() if hasattr(p, "full_tensor")}
    x = loss_of(other.eval(), 0)
    close(loss_of(base.eval(), 0), x, "loss")
    network.merge()
    close(loss_of(base, 0), x, "loss of the merged")
    network.unmerge()
    for key, t in before.items():
        assert torch.equal(base.get_parameter(key).full_tensor(), t), key  # type: ignore[attr-defined]


def chance_is_shared(rank: int, folder: Path) -> None:
    """Whatever the seeds of the processes are, an adapter is the same in all that share its layer."""
    for algorithm in (LoRA(rank=2), DoRA(DyLoRA(rank=4))):
        torch.manual_seed(rank)
        network = nerine.attach(base := parallel(), algorithm, dropout=0.3, rank_dropout=0.3, module_dropout=0.3)
        split = [a for path, _, a in network.adapters() if path.startswith("blocks")]
        optimiser = torch.optim.AdamW([p for a in split for p in a.parameters()], lr=0.1)
        for step in range(3):
            x = batch(step)[0]
            base.blocks[0].down(base.blocks[0].up(base.inlet(x).mT.detach())).square().mean().backward()
            optimiser.step()
        for adapter in split:
            for name in adapter.names:
                other = getattr(adapter, name).detach().clone()
                dist.broadcast(other, 0)
                assert torch.equal(getattr(adapter, name), other), f"{adapter.where}: {name}"


def orders_and_errors(rank: int, folder: Path) -> None:
    base, _ = attached(LoRA(rank=2))
    with pytest.raises(KeyError):  # torch's own: it wants layers without children
        parallelize_module(base, the_mesh(), PLAN)
    # a norm whose weight is split, or replicated, on a mesh is left out and said so
    base = parallel(**{"blocks.0.norm": SequenceParallel()})
    network = nerine.attach(base, DoRA(LoKr(rank=1)), train_norm=True)
    assert "split over processes" in network.report.skipped["blocks.0.norm"]
    assert "blocks.1.norm" in [path for path, *_ in network.adapters()]
    # both engines: tensor parallel, then the adapters, then fully_shard
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    base, network = attached(DoRA(LoRA(rank=2)), parallelize_module(model(), mesh["tensor"], PLAN), targets=nn.Linear)
    stir(network)
    fully_shard(base, mesh=mesh["data"])
    losses, want = alone(DoRA(LoRA(rank=2)), targets=nn.Linear)
    close(torch.tensor(train(base, network.parameters())), torch.tensor(losses), "losses")
    base.reshard()
    for key, t in network.named_parameters():
        close(t.full_tensor(), want[key], key)
    nerine.save(network, folder / "both.safetensors")
    late = parallelize_module(model(), mesh["tensor"], PLAN)
    fully_shard(late, mesh=mesh["data"])
    with pytest.raises(OptionError, match="fully_shard"):
        nerine.attach(late, LoRA(rank=2))
    # sequence parallel: what is between the layers is split along the tokens
    plan = {
        "blocks.0.up": ColwiseParallel(),
        "blocks.0.down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }
    base = parallelize_module(model(), the_mesh(), plan)
    network = nerine.attach(base, DoRA(LoRA(rank=2)), targets=["up", "down"])
    y = base.blocks[0].down(base.blocks[0].up(torch.randn(2, 6, 12, dtype=torch.float64)))
    assert y.full_tensor().shape == (2, 6, 12)


@pytest.mark.slow
def test_tensor_parallel(run_on_two: Callable[..., None]) -> None:
    run_on_two(equal_to_one_process, chance_is_shared, orders_and_errors, ignore=("FSDP2-wrapped module",))
