"""Makes a process use the simulated devices as `cuda:0` and `cuda:1`.

A CPU build of torch has the module `torch.cuda`, but not the functions of C++ underneath. They are put there,
each on top of what torch offers for any accelerator, so that nearly all of `torch.cuda` is torch's own code.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
import types
from pathlib import Path

_TORCH_LIBRARIES = ("libc10.so", "libtorch_cpu.so", "libtorch.so")


def install(library: str | os.PathLike[str]) -> object:
    """Gives this process the devices, for good; returns the first as a `torch.device`.

    Raises:
        RuntimeError: torch is there already, and has found that it has no CUDA.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the simulated CUDA devices must be installed before torch is imported")
    _load(library)
    import torch

    _fill_in_bindings(torch)
    _complete_module(torch)
    _complete_storage(torch)
    return torch.device("cuda", 0)


def _load(library: str | os.PathLike[str]) -> None:
    spec = importlib.util.find_spec("torch")  # found, but not imported
    if spec is None or spec.origin is None:
        raise RuntimeError("torch is not installed")
    folder = Path(spec.origin).parent / "lib"
    for path in (*(folder / name for name in _TORCH_LIBRARIES), library):
        ctypes.CDLL(os.fspath(path), mode=ctypes.RTLD_GLOBAL)


def _fill_in_bindings(torch) -> None:
    """The functions of `torch._C` that `torch.cuda` calls."""
    C = torch._C
    simulated = torch.ops.simulated_cuda
    bindings = {
        "_cuda_getDeviceCount": simulated.device_count,
        "_cuda_getDevice": C._accelerator_getDeviceIndex,
        "_cuda_setDevice": C._accelerator_setDeviceIndex,
        "_cuda_exchangeDevice": C._accelerator_exchangeDevice,
        "_cuda_maybeExchangeDevice": C._accelerator_maybeExchangeDevice,
        "_cuda_synchronize": lambda: None,
        "_cuda_ipc_collect": lambda: None,
        "_cuda_emptyCache": lambda: None,
        "_cuda_memoryStats": C._accelerator_getDeviceStats,
        "_cuda_resetPeakMemoryStats": C._accelerator_resetPeakStats,
        "_cuda_resetAccumulatedMemoryStats": C._accelerator_resetAccumulatedStats,
        "_cuda_setMemoryFraction": simulated.set_memory_fraction,
        "_cuda_getMemoryFraction": simulated.memory_fraction,
        "_cuda_getArchFlags": lambda: None,
        "_cuda_getCurrentRawStream": lambda index: 0,
    }
    for name, function in bindings.items():
        setattr(C, name, function)


def _complete_module(torch) -> None:
    """What `torch.cuda` takes from its C++ half while it is imported, which is over."""
    cuda = torch.cuda
    cuda._initialized = True
    cuda._exchange_device = torch._C._cuda_exchangeDevice
    cuda._maybe_exchange_device = torch._C._cuda_maybeExchangeDevice
    cuda.default_generators = (torch.default_generator,) * cuda.device_count()
    cuda.graphs._cuda_isCurrentStreamCapturing = lambda: False
    properties = types.SimpleNamespace(
        name="simulated CUDA",
        major=8,
        minor=0,
        total_memory=torch.ops.simulated_cuda.total_memory(),
        multi_processor_count=1,
        gcnArchName="",
    )
    cuda._get_device_properties = lambda index: properties

    # Functions of their own: torch.compile tells them from those of torch.accelerator by identity.
    def mem_get_info(device=None) -> tuple[int, int]:
        return torch.accelerator.get_memory_info(device)

    def current_stream(device=None) -> torch.Stream:
        return torch.accelerator.current_stream(device)

    def default_stream(device=None) -> torch.Stream:
        index = cuda._utils._get_device_index(device, optional=True)
        return torch.Stream(stream_id=0, device_index=index, device_type=torch._C._autograd.DeviceType.CUDA.value)

    def set_stream(stream: torch.Stream | None) -> None:
        if stream is not None:
            torch.accelerator.set_stream(stream)

    def stream(stream: torch.Stream | None):
        return stream or contextlib.nullcontext()

    for function in (mem_get_info, current_stream, default_stream, set_stream, stream):
        setattr(cuda, function.__name__, function)
    cuda.memory.mem_get_info = mem_get_info
    cuda.Stream = cuda.streams.Stream = torch.Stream
    cuda.Event = cuda.streams.Event = torch.Event


def _complete_storage(torch) -> None:
    """The methods of storages that are compiled out: `resize_`, `clone`, and what `torch.load` calls."""
    resize_elsewhere, clone_elsewhere = torch.UntypedStorage.resize_, torch.UntypedStorage.clone

    def whole(storage) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

    def resize_(storage, size: int) -> object:
        if storage.device.type != "cuda":
            return resize_elsewhere(storage, size)
        torch.ops.simulated_cuda.resize_storage_of(whole(storage), size)
        return storage

    def clone(storage) -> object:
        return whole(storage).clone().untyped_storage() if storage.device.type == "cuda" else clone_elsewhere(storage)

    def tag(storage) -> str | None:
        return str(storage.device) if storage.device.type == "cuda" else None

    def restore(storage, location: str) -> object:
        is_ours = location.startswith("cuda")
        return whole(storage).to(location).untyped_storage() if is_ours else None

    torch.UntypedStorage.resize_ = resize_
    torch.UntypedStorage.clone = clone
    torch.serialization.register_package(1, tag, restore)
