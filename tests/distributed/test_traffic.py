"""What engines send for an adapted model in a step: the arithmetic of docs/scaling.md, counted on the operations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from nerine import DoRA, LoKr, LoRA
from nerine.testing.battery import close
from small_world import alone, attached, copied, loss_of, stir, train
from two_processes import WORLD, Failures, the_mesh

VIEW = "FSDP2-wrapped module"  # as in test_fsdp.py
CASES = (LoRA(rank=2), LoKr(rank=1, factor=2), DoRA(LoRA(rank=2)))


class Traffic(TorchDispatchMode):
    """Bytes of the whole tensors of every collective, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sizes = [t.numel() * t.element_size() for t in _tensors(args)]
            self.bytes[func.overloadpacket.__name__.strip("_")] += max(sizes)
        return func(*args, **(kwargs or {}))


def _tensors(values: Any) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def size(parameters: Iterable[nn.Parameter], shares: int = 1) -> int:
    """Bytes of parameters, each with its first dimension filled up to a multiple of the shares."""
    total = 0
    for p in parameters:
        first, *others = p.shape
        total += -(-first // shares) * shares * math.prod(others) * p.element_size()
    return total


def step(model: Callable[[Tensor], Tensor], rank: int) -> Counter[str]:
    """The traffic of one step, after one that has set everything up."""
    loss_of(model, 0, rank).backward()
    with Traffic() as traffic:
        loss_of(model, 1, rank).backward()
    return traffic.bytes


def ddp_reduces_gradients_of_adapters(rank: int, folder: Path) -> None:
    failures = Failures()
    for algorithm in CASES:
        with failures.case(algorithm):
            base, network = attached(algorithm)
            wrapped, sent = DistributedDataParallel(base), [0]

            def reduce(state, bucket, sent=sent):  # type: ignore[no-untyped-def]  # torch looks at annotations here
                sent[0] += bucket.buffer().nbytes
                return allreduce_hook(dist.group.WORLD, bucket)

            wrapped.register_comm_hook(None, reduce)
            for number in range(2):
                loss_of(wrapped, number, rank).backward()
            assert sent == [2 * size(network.parameters())]
    failures.tell()


def fsdp_gathers_the_base_and_scatters_only_adapters(rank: int, folder: Path) -> None:
    """Blocks are gathered in both passes, the rest once; frozen weights have no gradient to scatter."""
    failures = Failures()
    for algorithm in CASES:
        with failures.case(algorithm):
            base, network = attached(algorithm)
            within = size(base.blocks.parameters(), WORLD)
            rest = size(base.parameters(), WORLD) - within
            trained = size(network.parameters(), WORLD)
            for unit in (*base.blocks, base):
                fully_shard(unit, mesh=the_mesh())
            sent = step(base, rank)
            assert sent == {"allgather_base": 2 * within + rest, "reduce_scatter_base": trained}
            assert trained < rest + within
    failures.tell()


def hybrid_equals_one_process(rank: int, folder: Path) -> None:
    """HSDP: whole copies of shares. With two processes there is a group of two copies, each in one share."""
    failures = Failures()
    mesh = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("replicate", "shard"))
    for algorithm in CASES:
        with failures.case(algorithm):
            _, want = alone(algorithm)
            base, network = attached(algorithm)
            stir(network)
            for unit in (*base.blocks, base):
                fully_shard(unit, mesh=mesh)
            train(base, network.parameters(), rank)
            base.reshard()
            for key, tensor in copied(network).items():
                close(tensor.full_tensor(), want[key], key)  # type: ignore[attr-defined]
            with Traffic() as traffic:
                loss_of(base, 2, rank).backward()
            assert traffic.bytes["allreduce"] == size(network.parameters())
    failures.tell()


def test_traffic(run_on_two: Callable[..., None]) -> None:
    run_on_two(
        ddp_reduces_gradients_of_adapters,
        fsdp_gathers_the_base_and_scatters_only_adapters,
        hybrid_equals_one_process,
        ignore=(VIEW,),
    )
