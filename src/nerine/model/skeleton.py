"""A model without its class: plain torch layers on meta, as the names and shapes of its tensors tell.

It computes nothing. It has the paths, kinds and shapes of all layers, so that targets, presets, plans and files work
on a checkpoint whose program is not installed, or not written yet. A convolution's groups, stride and padding are not
in its weight, and no change of weights depends on them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["skeleton"]

Tensors = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
_EMBEDDINGS = re.compile(
    r"(^|[._])(embed_tokens|tok_embeddings|token_embedding|position_embedding|word_embeddings|position_embeddings"
    r"|token_type_embeddings|relative_attention_bias|shared|wte|wpe|class_embedding|label_embedding"
    r"|embedding_table|embedding)$"
)
_GPT = re.compile(r"(^|\.)(c_attn|c_fc|c_proj)$")
_CONVS: Mapping[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_TRANSPOSED: Mapping[int, Any] = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}


class Part(nn.Module):
    """A module of which nothing is known but its parts."""


class Conv1D(nn.Module):
    """A linear layer whose weight is `[in, out]`, as GPT-2 has it."""

    def __init__(self, inputs: int, out: int) -> None:
        super().__init__()
        self.nf = out
        self.weight = _empty((inputs, out))
        self.bias = _empty((out,))


class Norm(nn.Module):
    """A normalisation with a scale, and maybe an offset."""

    def __init__(self, shape: tuple[int, ...], bias: bool) -> None:
        super().__init__()
        self.weight = _empty(shape)
        self.bias = _empty(shape) if bias else None


def skeleton(tensors: Tensors) -> nn.Module:
    """A model that has tensors of these names, with {name: (shape, format)}.

    What is not stored in floating point (a packed weight) is left out, with the layer that it belongs to.
    """
    root = Part()
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, (shape, dtype) in tensors.items():
        path, _, attr = name.rpartition(".")
        if dtype.is_floating_point and all(shape):
            groups.setdefault(path, {})[attr] = shape
    is_gpt = any(path.rpartition(".")[2] == "wte" for path in groups)
    attentions = {path for path, own in groups.items() if _is_attention(path, own, groups)}
    for path, own in groups.items():
        if path.endswith(".out_proj") and path.rpartition(".")[0] in attentions:
            continue
        module = _attention(own) if path in attentions else _layer(path, own, is_gpt)
        _put(root, path, module if module is not None else _loose(own))
    return root


def _empty(shape: Iterable[int]) -> nn.Parameter:
    return nn.Parameter(torch.empty(tuple(shape), device="meta"), requires_grad=False)


def _is_attention(path: str, own: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]) -> bool:
    return len(own.get("in_proj_weight", ())) == 2 and "weight" in groups.get(f"{path}.out_proj", {})


def _attention(own: Mapping[str, tuple[int, ...]]) -> nn.Module:
    return nn.MultiheadAttention(own["in_proj_weight"][1], 1, bias="in_proj_bias" in own, device="meta")


def _layer(path: str, own: Mapping[str, tuple[int, ...]], is_gpt: bool) -> nn.Module | None:
    """The layer that has such tensors; None where they are of no known kind."""
    shape, bias = own.get("weight"), own.get("bias")
    if shape is None or not set(own) <= {"weight", "bias", "running_mean", "running_var"}:
        return None
    if len(shape) == 1:
        return Norm(shape, bias is not None) if bias in (None, shape) else None
    if len(shape) == 2 and _EMBEDDINGS.search(path) and bias is None:
        return nn.Embedding(*shape, device="meta")
    if len(shape) == 2 and is_gpt and _GPT.search(path) and bias in (None, shape[1:]):
        return Conv1D(*shape)
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0], bias is not None, device="meta") if bias in (None, shape[:1]) else None
    if len(shape) not in _CONVS:
        return None
    if bias in (None, shape[:1]):
        return _conv(_CONVS, shape[1], shape[0], shape, bias)
    return _conv(_TRANSPOSED, shape[0], shape[1], shape, bias) if bias == shape[1:2] else None


def _conv(kinds: Mapping[int, Any], inputs: int, out: int, shape: tuple[int, ...], bias: object) -> nn.Module:
    made: nn.Module = kinds[len(shape)](inputs, out, shape[2:], bias=bias is not None, device="meta")
    return made


def _loose(own: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """Parameters that belong to no known layer."""
    module = Part()
    for attr, shape in own.items():
        module.register_parameter(attr, _empty(shape))
    return module


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at its path, keeping what is at and below it already."""
    parent = root
    names = path.split(".") if path else []
    for name in names[:-1]:
        child = parent._modules.get(name)
        if child is None:
            child = Part()
            parent._modules[name] = child
        parent = child
    here = parent._modules.get(names[-1]) if names else root
    if here is None:
        parent._modules[names[-1]] = module
        return
    for attr, parameter in module._parameters.items():  # a module with parts and parameters of its own
        here.register_parameter(attr, parameter)
    for name, child in module._modules.items():
        here._modules[name] = child
