"""A step on several GPUs as tasks on streams: a small simulation of discrete events.

Every GPU does the same at the same time, so that one of them stands for all. It has a stream that computes and one
network; a stream takes its tasks in the order in which they are issued, each once those that it waits for are over.
Knows durations and bytes, and nothing of layers or algorithms.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Block", "Machine", "Step", "Task", "ddp", "fsdp", "run"]

BUCKET = 25e6  # bytes of gradients that DistributedDataParallel reduces at once


@dataclass(frozen=True)
class Task:
    """`after` are names of tasks that must be over, `begun` of tasks that must at least have begun."""

    name: str
    stream: str
    seconds: float
    after: tuple[str, ...] = ()
    begun: tuple[str, ...] = ()


@dataclass(frozen=True)
class Machine:
    """An H100 node, by assumption: what of the data sheet's rates is reached, and how long a hop of a ring takes."""

    flops: float = 0.6 * 989e12  # bf16, dense
    memory: float = 0.8 * 3.35e12  # bytes a second
    link: float = 0.8 * 450e9  # within a node, each way, each GPU
    nic: float = 0.8 * 50e9  # between nodes, each way, each GPU
    node: int = 8
    hop: float = 5e-6

    def seconds(self, flops: float, bytes_: float) -> float:
        return flops / self.flops + bytes_ / self.memory

    def ring(self, n: int) -> float:
        """Bytes a second that pass between neighbours of a ring over n GPUs: across nodes as many rings as a node has
        GPUs, each through a NIC of its own."""
        return self.link if n <= self.node else min(self.link, self.node * self.nic)

    def gather(self, size: float, n: int) -> float:
        """Seconds of an all-gather, or reduce-scatter, of `size` bytes in all over n GPUs."""
        return 0.0 if n == 1 or not size else size * (n - 1) / n / self.ring(n) + (n - 1) * self.hop

    def reduce(self, size: float, n: int) -> float:
        """Seconds of an all-reduce."""
        return 2 * self.gather(size, n)

    def across(self, size: float, n: int) -> float:
        """Seconds of an all-reduce of what each GPU of a node has a share of, with its like in the other nodes."""
        nodes = n // self.node
        return 0.0 if nodes < 2 else 2 * (size / self.node * (nodes - 1) / nodes / self.nic + (nodes - 1) * self.hop)


@dataclass(frozen=True)
class Block:
    """One unit of the model: seconds of both passes, bytes that are gathered, bytes of gradients."""

    forward: float
    backward: float
    weights: float
    gradients: float


@dataclass(frozen=True)
class Step:
    """Seconds of a step, and how much of them nothing is computed."""

    seconds: float
    exposed: float


def run(tasks: Sequence[Task]) -> dict[str, tuple[float, float]]:
    """When each task begins and ends.

    Raises:
        ValueError: tasks wait for each other.
    """
    waiting: dict[str, deque[Task]] = {}
    for task in tasks:
        waiting.setdefault(task.stream, deque()).append(task)
    begun: dict[str, float] = {}
    over: dict[str, tuple[float, float]] = {}
    running: list[tuple[float, str, str]] = []  # end, name, stream
    busy: set[str] = set()
    now = 0.0
    while True:
        started = True
        while started:
            started = False
            for stream, queue in waiting.items():
                if stream in busy or not queue:
                    continue
                task = queue[0]
                if all(name in over for name in task.after) and all(name in begun for name in task.begun):
                    queue.popleft()
                    begun[task.name] = now
                    busy.add(stream)
                    heapq.heappush(running, (now + task.seconds, task.name, stream))
                    started = True
        if not running:
            break
        now, name, stream = heapq.heappop(running)
        over[name] = begun[name], now
        busy.discard(stream)
    if any(waiting.values()):
        raise ValueError(f"these wait for each other: {[queue[0].name for queue in waiting.values() if queue]}")
    return over


def _result(tasks: Sequence[Task]) -> Step:
    end = max(stop for _, stop in run(tasks).values())
    return Step(end, end - sum(task.seconds for task in tasks if task.stream == "compute"))


def ddp(blocks: Sequence[Block], machine: Machine, n: int, optimiser: float) -> Step:
    """DistributedDataParallel: every GPU has all weights; gradients are reduced in buckets as backward fills them."""
    tasks = [Task(f"forward {i}", "compute", block.forward) for i, block in enumerate(blocks)]
    size, buckets = 0.0, []
    for i, block in reversed(list(enumerate(blocks))):
        tasks.append(Task(f"backward {i}", "compute", block.backward))
        size += block.gradients
        if size >= BUCKET or i == 0:
            buckets.append(f"reduce {i}")
            tasks.append(Task(buckets[-1], "network", machine.reduce(size, n), after=(f"backward {i}",)))
            size = 0.0
    tasks.append(Task("optimiser", "compute", optimiser, after=tuple(buckets)))
    return _result(tasks)


def fsdp(blocks: Sequence[Block], machine: Machine, n: int, optimiser: float, *, hybrid: bool = False) -> Step:
    """FSDP2: a block's weights are gathered while the one before it computes, in both passes; gradients are scattered.

    With `hybrid` shares are spread within a node, and gradients reduced across nodes as well. `optimiser` is the time
    for a whole model's state.
    """
    shares = machine.node if hybrid else n
    last = len(blocks) - 1
    tasks: list[Task] = []
    gathers = [machine.gather(block.weights, shares) for block in blocks]
    for i, block in enumerate(blocks):
        before = (f"forward {i - 1}",) if i else ()
        tasks.append(Task(f"gather {i}", "network", gathers[i], begun=before))
        tasks.append(Task(f"forward {i}", "compute", block.forward, after=(f"gather {i}",)))
    scatters = []
    for i in range(last, -1, -1):
        begun = (f"backward {i + 1}",) if i < last else (f"forward {last}",)
        after = () if i < last else (f"forward {last}",)
        tasks.append(Task(f"gather again {i}", "network", gathers[i], after=after, begun=begun))
        tasks.append(Task(f"backward {i}", "compute", blocks[i].backward, after=(f"gather again {i}",)))
        if i < last:  # issued after the gather for the next block
            scatters.append(_scatter(i + 1, blocks[i + 1], machine, n, shares, hybrid))
            tasks.append(scatters[-1])
    scatters.append(_scatter(0, blocks[0], machine, n, shares, hybrid))
    tasks.append(scatters[-1])
    tasks.append(Task("optimiser", "compute", optimiser / shares, after=tuple(task.name for task in scatters)))
    return _result(tasks)


def _scatter(i: int, block: Block, machine: Machine, n: int, shares: int, hybrid: bool) -> Task:
    seconds = machine.gather(block.gradients, shares)
    if hybrid:
        seconds += machine.across(block.gradients, n)
    return Task(f"scatter {i}", "network", seconds, after=(f"backward {i}",))
