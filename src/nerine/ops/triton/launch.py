"""What every kernel needs before it starts: compiling, sizes of blocks, and the tensors that none of them takes.

Sizes come from shapes by plain arithmetic, never from a search: the same shapes give the same blocks, and so the same
bits, in every run. Sums over many programs are written as parts and added by torch, not by atomics, for that reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from nerine.errors import OptionError

__all__ = ["check", "jit", "launching", "padded", "parts", "unsuited_tensors"]

_PROGRAMS = 256  # what fills a large GPU about twice; a reduction is cut into parts until there are as many
_HALF = (torch.float16, torch.bfloat16)


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, with a type of its own."""
    return triton.jit(function)


@jit
def _nothing() -> None:
    pass


def padded(size: int, least: int = 16) -> int:
    """The power of two at or above `size`, and at least `least`: no product of blocks is smaller than 16."""
    return max(least, 1 << max(0, size - 1).bit_length())


def parts(length: int, step: int, programs: int) -> tuple[int, int]:
    """Into how many parts a loop over `length` is cut, and the length of each, a multiple of `step`."""
    steps = max(1, -(-length // step))
    wanted = min(steps, max(1, -(-_PROGRAMS // max(1, programs))))
    each = -(-steps // wanted)
    return -(-steps // each), each * step


def launching(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which kernels start on the device of `t`, which need not be the current one."""
    return torch.cuda.device_of(t)


def unsuited_tensors(data: Tensor, *trained: Tensor | None) -> str:
    """Why no kernel takes these: `data` is in fp32, fp16 or bf16, the others in fp32 or in the format of `data`."""
    interpreted = not isinstance(_nothing, triton.JITFunction)
    if data.device.type != "cuda" and not (interpreted and data.device.type == "cpu"):
        return f"tensors are on {data.device.type}, kernels run on cuda"
    if data.dtype not in (torch.float32, *_HALF):
        return f"{data.dtype} is none of float32, float16, bfloat16"
    for t in trained:
        if t is not None and t.device != data.device:
            return f"tensors are on {data.device} and on {t.device}"
        if t is not None and t.dtype not in (torch.float32, data.dtype):
            return f"{t.dtype} is neither float32 nor {data.dtype}"
    return ""


def check(name: str, why: str) -> None:
    """Raises OptionError where there is a reason `why` a kernel cannot run."""
    if why:
        raise OptionError(f"the kernel {name} cannot take these tensors: {why}; use the reference in nerine.ops")
