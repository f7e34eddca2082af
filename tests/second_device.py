"""A second device with real values, for machines that have none.

torch keeps a slot for foreign backends, PrivateUse1. `install` names it `fakegpu` and fills it in
Python: a `FakeGpuTensor` says that it lives on `fakegpu:0` or `fakegpu:1`, keeps its values in a CPU
tensor, computes there, and refuses mixed devices with CUDA's sentence. Unlike `meta` it computes, so a
whole training step can be compared with the CPU's.

What it does not do: storage (`safetensors` needs `.cpu()` first), streams, its own random numbers.

The installation cannot be undone, so tests go through the fixture `run_on_second_device`, which runs a
snippet in a process of its own (see `snippets.py`):

    def test_it(run_on_second_device):
        run_on_second_device(\"\"\"
            assert torch.ones(2, device=DEVICE).sum().item() == 2
        \"\"\")
"""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from snippets import run_snippet

NAME = "fakegpu"
COUNT = 2

_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_FACTORIES = ("eye", "eye.m", "arange", "arange.start", "arange.start_step", "linspace", "randperm")
_AUTOCAST_TO_LOW = ("linear", "matmul", "mm", "bmm", "addmm", "conv1d", "conv2d", "conv3d")

# Registrations and the mode last as long as these objects do.
_KEPT_ALIVE: list[object] = []


class FakeGpuTensor(torch.Tensor):
    """A tensor whose values are in `inner`, on the CPU, and whose device is a fakegpu."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner, device=None, requires_grad=False, **ignored):
        if device is None:  # accelerate rebuilds a parameter as type(parameter)(values, requires_grad=...)
            return torch.nn.Parameter(inner, requires_grad=requires_grad)
        outer = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        outer.inner = inner
        return outer

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **ignored) -> str:
        return f"{repr(self.inner)[:-1]}, device='{self.device}')"

    @classmethod
    def __torch_dispatch__(cls, func, kinds, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if func not in _COPIES:
            _refuse_mixed(func, args, tensors)
        target = _target(func, args, kwargs, tensors)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)

        out = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))

        if target.type != NAME:
            return args[0] if func is _aten.copy_.default else out
        out = tree_map(lambda t: _wrap(t, target), out)
        if any(r.alias_info is not None for r in func._schema.returns):
            return return_and_correct_aliasing(func, args, kwargs, out)
        return out


def _unwrap(value):
    return value.inner if isinstance(value, FakeGpuTensor) else value


def _wrap(value, device: torch.device):
    if isinstance(value, torch.Tensor) and not isinstance(value, FakeGpuTensor):
        return FakeGpuTensor(value, device)
    return value


def _target(func, args, kwargs, tensors: list[torch.Tensor]) -> torch.device:
    """Where the result lives: where it was asked for, else where copy_ writes, else with its operands."""
    if kwargs.get("device") is not None:
        return _with_index(kwargs["device"])
    if func is _aten.copy_.default:
        return args[0].device
    return next(t.device for t in tensors if isinstance(t, FakeGpuTensor))


def _refuse_mixed(func, args, tensors: list[torch.Tensor]) -> None:
    """Raises CUDA's sentence on two devices. 0-dim CPU tensors are numbers; indices may be on the CPU."""
    cpu_indices = {id(t) for t in tree_leaves(args[1]) if _is_on_cpu(t)} if func in _INDEXING else ()
    devices: list[torch.device] = []
    for t in tensors:
        is_number = t.device.type == "cpu" and t.dim() == 0
        if not is_number and id(t) not in cpu_indices and t.device not in devices:
            devices.append(t.device)
    if len(devices) > 1:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{devices[0]} and {devices[1]}! (when checking the arguments of {func})"
        )


def _is_on_cpu(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu"


def _with_index(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type == NAME and device.index is None:
        return torch.device(NAME, getattr(torch, NAME).current_device())
    return device


class _DataAssignment(TorchFunctionMode):
    """`p.data = t` across the border: CUDA exchanges the storage; here the two tensors are swapped."""

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        if func != torch.Tensor.data.__set__ or not any(isinstance(t, FakeGpuTensor) for t in args):
            return func(*args, **(kwargs or {}))
        old, value = args
        new = value.detach()
        if isinstance(old, torch.nn.Parameter):
            new = torch.nn.Parameter(new, requires_grad=old.requires_grad)
        grad = old.grad
        torch.utils.swap_tensors(old, new)
        old.grad = grad if grad is None or grad.device == old.device else None


def _device_module() -> types.ModuleType:
    """The module `torch.fakegpu`, as torch.cuda is for CUDA."""
    current = 0

    def set_device(device: int | str | torch.device) -> None:
        nonlocal current
        current = device if isinstance(device, int) else _with_index(device).index

    module = types.ModuleType(f"torch.{NAME}")
    functions: dict[str, Callable] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: COUNT,
        "current_device": lambda: current,
        "set_device": set_device,
        "synchronize": lambda *ignored: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda *ignored: 0,
        "manual_seed": lambda seed: None,  # torch.manual_seed has seeded the CPU's generator, used here
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda *ignored: torch.get_rng_state(),
        "set_rng_state": lambda state, *ignored: torch.set_rng_state(state),
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
    }
    for name, function in functions.items():
        setattr(module, name, function)
    return module


def _register_factories() -> None:
    library = torch.library.Library("aten", "IMPL")
    _KEPT_ALIVE.append(library)

    def empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        memory_format = memory_format or torch.contiguous_format
        return FakeGpuTensor(torch.empty(size, dtype=dtype, memory_format=memory_format), _with_index(device))

    def empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
        return FakeGpuTensor(torch.empty_strided(size, stride, dtype=dtype), _with_index(device))

    def copy_from(source, target, non_blocking=False):
        _unwrap(target).copy_(_unwrap(source))
        return target

    def on_cpu_first(function):
        def make(*args, device, pin_memory=None, **kwargs):
            return FakeGpuTensor(function(*args, device="cpu", **kwargs), _with_index(device))

        return make

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    for name in _FACTORIES:
        packet, _, overload = name.partition(".")
        function = getattr(getattr(_aten, packet), overload or "default")
        library.impl(name, on_cpu_first(function), "PrivateUse1")


def _register_autocast() -> None:
    """Products run in the autocast dtype, as on CUDA; everything else falls through."""
    fallthrough = torch.library.Library("_", "IMPL")
    fallthrough.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    library = torch.library.Library("aten", "IMPL")
    _KEPT_ALIVE.extend((fallthrough, library))
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def lowered(function):
        def run(*args):
            dtype = torch.get_autocast_dtype(NAME)

            def cast(value):
                is_real = isinstance(value, torch.Tensor) and value.is_floating_point()
                return value.to(dtype) if is_real else value

            with torch._C._ExcludeDispatchKeyGuard(key):
                return function(*tree_map(cast, args))

        return run

    for name in _AUTOCAST_TO_LOW:
        library.impl(name, lowered(getattr(_aten, name).default), "AutocastPrivateUse1")


def install() -> torch.device:
    """Gives this process the devices `fakegpu:0` and `fakegpu:1`, for good; returns the first."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, backend_module=_device_module())
    _register_factories()
    _register_autocast()
    # A parameter keeps its identity in Module.to, as on CUDA, though its Python class changes.
    torch.__future__.set_swap_module_params_on_conversion(True)
    mode = _DataAssignment()
    mode.__enter__()
    _KEPT_ALIVE.append(mode)
    return torch.device(NAME, 0)


@pytest.fixture
def run_on_second_device(tmp_path: Path) -> Callable[[str], None]:
    """Executes a snippet in a process that has a second device; fails with the snippet's traceback."""
    return lambda code: run_snippet(code, tmp_path, device="second_device.install()")
