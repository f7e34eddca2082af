"""GGUF blocks as diffusers holds them: bytes in a `GGUFParameter` that knows its quantisation type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nerine.errors import MergeError
from nerine.model.storage.kind import Storage, is_named

__all__ = ["GGUF"]


def _read(module: nn.Module, stored: Any) -> Tensor:
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    weight: Tensor = dequantize_gguf_tensor(stored.detach())
    return weight.as_subclass(Tensor).to(torch.float32)


def _write(module: nn.Module, stored: Any, weight: Tensor) -> nn.Parameter:
    import gguf

    try:
        blocks = gguf.quants.quantize(weight.to("cpu", torch.float32).numpy(), stored.quant_type)
    except NotImplementedError:
        raise MergeError(
            f"the gguf package reads {stored.quant_type.name} and does not write it; merge into the weights that the "
            "file was made from, or keep the adapter beside it"
        ) from None
    data = torch.from_numpy(blocks).to(stored.device)
    new: nn.Parameter = type(stored)(data, requires_grad=False, quant_type=stored.quant_type)
    return new


GGUF = Storage("GGUF", lambda module, stored: is_named(stored, "GGUFParameter"), _read, _write)
