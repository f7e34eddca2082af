"""What a snippet reads from the devices and sets on them, beyond what `torch.cuda` offers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Counters(NamedTuple):
    """What the simulated devices did, all of them together.

    Copies are those that the program asked for; `numbers_read` counts `.item()` and its like, where a GPU makes
    the host wait.
    """

    operations: int
    copies_to_device: int
    bytes_to_device: int
    copies_to_host: int
    bytes_to_host: int
    copies_between_devices: int
    bytes_between_devices: int
    numbers_read: int

    def since(self, earlier: Counters) -> Counters:
        """What has happened between two readings."""
        return Counters(*(now - then for now, then in zip(self, earlier, strict=True)))


def is_simulated() -> bool:
    """Whether `cuda` is the simulation in this process, and not a GPU."""
    torch = sys.modules.get("torch")
    return torch is not None and hasattr(torch.ops.simulated_cuda, "counters")


def counters() -> Counters:
    """The counters of this process, from its start.

    Raises:
        RuntimeError: `cuda` is a GPU, which does not count; ask `is_simulated()` before.
    """
    import torch

    if not is_simulated():
        raise RuntimeError("only the simulated devices count; ask is_simulated() before")
    return Counters(*torch.ops.simulated_cuda.counters())


@contextmanager
def memory_limit(size: int, device: object = None) -> Iterator[None]:
    """Lets the device (the current one by default) hold at most `size` bytes; more is `torch.OutOfMemoryError`.

    A GPU reaches its limit earlier, since its allocator takes memory in blocks of 2 MiB and more.
    """
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(size / total, 1.0), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
