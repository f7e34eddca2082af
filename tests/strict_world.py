"""The world every test runs in: no mixed devices, no lucky memory, no leaking randomness.

Code written on a CPU passes its tests there and breaks on the user's GPU: a tensor made on the wrong
device, a fresh buffer read before it is written, a draw that depends on the test before. This module
makes each of these fail on a CPU as well. It knows torch and nothing of nerine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten

_COPIES = {_aten.copy_, _aten.copy, _aten._to_copy, _aten._copy_from}
_INDEXING = {
    _aten.index,
    _aten.index_put,
    _aten.index_put_,
    _aten._index_put_impl_,
    _aten._unsafe_index,
    _aten._unsafe_index_put,
}


class MixedDevices(AssertionError):
    """An operation met tensors of two device types. Not a RuntimeError, so that no fallback hides it."""


class DeviceGuard(TorchDispatchMode):
    """Refuses what a GPU refuses: an operation on tensors that live on different types of device.

    Exempt, as on a GPU: copies, 0-dim CPU tensors (they count as numbers), CPU indices. It sits at the
    dispatcher, where `linear` and `einsum` have come apart into the operations that really run, and so
    sees the pairs that `meta` tensors let through.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Lets torch.compile trace as if the guard were not there (torch asks from 2.8 on)."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = getattr(func, "overloadpacket", None)
        if packet not in _COPIES:
            found: set[str] = set()
            _gather(args[:1] + args[2:] if packet in _INDEXING else args, found)
            if kwargs:
                _gather(tuple(kwargs.values()), found)
            if packet in _INDEXING:
                indices: set[str] = set()
                _gather(args[1:2], indices)
                found |= indices - {"cpu"}
            if len(found) > 1:
                first, *_, last = sorted(found)
                raise MixedDevices(f"{func} met tensors on {first} and on {last}; move one of them first")
        return func(*args, **kwargs)


def _gather(values: Sequence[object], found: set[str]) -> None:
    for value in values:
        if isinstance(value, torch.Tensor):
            kind = value.device.type
            if kind != "cpu" or value.dim():
                found.add(kind)
        elif isinstance(value, (list, tuple)):
            _gather(value, found)


@contextmanager
def strict_world(*, guard: bool = True, cuda: bool = False, seed: int = 0) -> Iterator[None]:
    """Seeds torch, poisons fresh memory with NaN, guards devices; leaves everything as it was.

    `cuda` says whether the generators of the GPUs are kept and restored too, which starts CUDA.
    """
    deterministic = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
    )
    devices = range(torch.cuda.device_count()) if cuda else ()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        deterministic.fill_uninitialized_memory = True
        try:
            if guard:
                stack.enter_context(DeviceGuard())
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            deterministic.fill_uninitialized_memory = before[2]
