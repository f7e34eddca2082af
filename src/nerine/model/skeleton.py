"""A model without its class: plain torch layers on meta, as the names and shapes of its tensors tell.

It computes nothing. It has the paths, kinds and shapes of all layers, so that targets, presets, plans and files work
on a checkpoint whose program is not installed, or not written yet. A convolution's groups, stride and padding are not
in its weight, and no change of weights depends on them.

What names and shapes leave open is settled as models have it: parts that are numbered are a list, parts that are made
up alike are of one class, and where a tensor could be of two kinds of layer, its name decides.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from nerine.model.pipeline import Parts

__all__ = ["SCALES", "is_packed", "skeleton"]

Tensors = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
Shapes = dict[str, tuple[int, ...]]  # of the tensors that one module has, by their names in it

# What stands beside a weight of eight bits: by what it is multiplied, and by what the input is, and settings.
SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
_BESIDE = {*SCALES, "weight_scale_2", "scale_input", "input_scale", "comfy_quant"}
_NORMALISED = {"weight", "bias", "running_mean", "running_var"}
_EMBEDDING = re.compile(
    r"(^|[._])(embed|embedding|embeddings|relative_attention_bias|embedding_table|style_embedder)$"
    r"|(^|\.)(shared|wte|wpe|embed_(?!out)\w+)$"
)
_GPT = re.compile(r"(^|\.)(c_attn|q_attn|c_fc|c_proj)$")
_UP = re.compile(r"up_?(sampl|scal)|deconv|transpos")
_CONVS: Mapping[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_TRANSPOSED: Mapping[int, Any] = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}


class Part(nn.Module):
    """A module of which nothing is known but its parts."""


class Checkpoint(Part):
    """The whole of it."""


class Conv1D(nn.Module):
    """A linear layer whose weight is `[in, out]`, as GPT-2 has it."""

    def __init__(self, inputs: int, out: int, bias: bool) -> None:
        super().__init__()
        self.nx, self.nf = inputs, out
        self.weight = _empty((inputs, out))
        self.bias = _empty((out,)) if bias else None


class Norm(nn.Module):
    """A normalisation with a scale, and maybe an offset."""

    def __init__(self, shape: tuple[int, ...], bias: bool) -> None:
        super().__init__()
        self.weight = _empty(shape)
        self.bias = _empty(shape) if bias else None


def skeleton(tensors: Tensors, parts: Collection[str] = ()) -> nn.Module:
    """A model that has tensors of these names, with {name: (shape, format)}.

    Its layers are in the order of their names, numbers by their size. With `parts`, the modules at the top that are
    parts of a pipeline, it consists of these alone, as `nerine.attach` sees a pipeline. What is not stored in floating
    point (see `is_packed`) is left out, with the layer that it belongs to.
    """
    root = Checkpoint()
    groups = _modules_of(tensors)
    above = {path[: match.start()] for path in groups for match in re.finditer(r"\.", path)}
    modules = above | groups.keys()
    is_gpt = any(path.endswith("c_attn") and _turns(own.get("weight", ())) for path, own in groups.items())
    attentions = {path for path, own in groups.items() if _is_attention(path, own, groups)}
    for path, own in groups.items():
        lead, _, last = path.rpartition(".")
        if last == "out_proj" and lead in attentions:
            continue
        if path in attentions:
            module: nn.Module | None = _attention(own)
        elif path in above or (not path and len(groups) > 1) or (last == "gate" and f"{lead}.experts" in modules):
            module = None  # a layer has no parts, and what chooses experts is none
        else:
            module = _layer(path, own, is_gpt)
        if not path and module is not None:
            return module  # a layer by itself
        _put(root, path, module if module is not None else _loose(own))
    _settle(root, {})
    return Parts({name: part for name, part in root._modules.items() if name in parts}) if parts else root  # type: ignore[misc]


def is_packed(name: str, dtype: torch.dtype) -> bool:
    """Whether a tensor is a weight in a form that only the program that made it can read."""
    return name.rpartition(".")[2] == "weight" and not dtype.is_floating_point


def _modules_of(tensors: Tensors) -> dict[str, Shapes]:
    """{path of a module: the shapes of its own tensors}."""
    packed = {name for name, (_, dtype) in tensors.items() if is_packed(name, dtype)}
    lost = {name.rpartition(".")[0] for name in packed}
    groups: dict[str, Shapes] = {}
    for name in sorted(tensors, key=_by_number):
        shape, dtype = tensors[name]
        path, _, attr = name.rpartition(".")
        if dtype.is_floating_point and all(shape) and path not in lost and not _is_beside(path, packed):
            groups.setdefault(path, {})[attr] = shape
    return {path: _without_scales(own) for path, own in groups.items()}


def _is_beside(path: str, packed: Collection[str]) -> bool:
    """Whether what is at a path stands beside a packed weight, as in "to_q.weight.absmax"."""
    return any(path[: match.start()] in packed for match in re.finditer(r"\.|$", path))


def _without_scales(own: Shapes) -> Shapes:
    return {attr: shape for attr, shape in own.items() if attr not in _BESIDE} if "weight" in own else own


def _by_number(name: str) -> list[tuple[int, str]]:
    """The order of a model, as far as names tell it: block 10 after block 2."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in name.split(".")]


def _empty(shape: Iterable[int]) -> nn.Parameter:
    return nn.Parameter(torch.empty(tuple(shape), device="meta"), requires_grad=False)


# -- layers ------------------------------------------------------------------------------------------------------------
def _turns(shape: tuple[int, ...]) -> bool:
    """Whether queries, keys and values stand side by side, so that weights are `[in, out]`."""
    return len(shape) == 2 and shape[1] == 3 * shape[0]


def _is_attention(path: str, own: Shapes, groups: Mapping[str, Shapes]) -> bool:
    has_weights = "in_proj_weight" in own or {f"{part}_proj_weight" for part in "qkv"} <= own.keys()
    return has_weights and "weight" in groups.get(f"{path}.out_proj", {})


def _attention(own: Shapes) -> nn.Module:
    if "in_proj_weight" in own:
        width, inputs = own["in_proj_weight"][-1], {}
    else:
        width, inputs = own["q_proj_weight"][-1], {f"{part}dim": own[f"{part}_proj_weight"][-1] for part in "kv"}
    return nn.MultiheadAttention(width, 1, bias="in_proj_bias" in own, device="meta", **inputs)


def _layer(path: str, own: Shapes, is_gpt: bool) -> nn.Module | None:
    """The layer that has such tensors; None where they are of no known kind."""
    shape, bias = own.get("weight"), own.get("bias")
    if not shape or not set(own) <= _NORMALISED:
        return None
    if len(shape) == 1 or bias == shape:
        return Norm(shape, bias is not None) if bias in (None, shape) else None
    if len(shape) == 2:
        return _matrix(path, shape, bias, is_gpt)
    if len(shape) not in _CONVS:
        return None
    turned = bias in (None, shape[1:2])
    if turned and _UP.search(path) and not any(k % 2 for k in shape[2:]):
        return _conv(_TRANSPOSED, shape[0], shape[1], shape, bias)
    if bias in (None, shape[:1]):
        return _conv(_CONVS, shape[1], shape[0], shape, bias)
    return _conv(_TRANSPOSED, shape[0], shape[1], shape, bias) if turned else None


def _matrix(path: str, shape: tuple[int, ...], bias: tuple[int, ...] | None, is_gpt: bool) -> nn.Module | None:
    if _EMBEDDING.search(path) and bias is None:
        return nn.Embedding(shape[0], shape[1], _weight=_empty(shape).data)  # drawing one takes seconds, on meta too
    if is_gpt and _GPT.search(path) and bias in (None, shape[1:]):
        return Conv1D(shape[0], shape[1], bias is not None)
    return nn.Linear(shape[1], shape[0], bias is not None, device="meta") if bias in (None, shape[:1]) else None


def _conv(kinds: Mapping[int, Any], inputs: int, out: int, shape: tuple[int, ...], bias: object) -> nn.Module:
    made: nn.Module = kinds[len(shape)](inputs, out, shape[2:], bias=bias is not None, device="meta")
    return made


def _loose(own: Shapes) -> nn.Module:
    """Parameters that belong to no known layer."""
    module = Part()
    for attr, shape in own.items():
        module.register_parameter(attr, _empty(shape))
    return module


# -- the tree ----------------------------------------------------------------------------------------------------------
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


def _settle(module: nn.Module, kinds: dict[frozenset[str], type[Part]]) -> None:
    """Make lists of parts that are numbered, and one class of all parts that are made up alike."""
    for name, child in module._modules.items():
        if type(child) is not Part:
            continue
        _settle(child, kinds)
        parts = child._modules
        if parts and not child._parameters and all(map(str.isdecimal, parts)):
            made = nn.ModuleList()  # by its own doors it would take no numbers with gaps, where nothing is stored
            made._modules.update((number, part) for number, part in parts.items() if part is not None)
            module._modules[name] = made
        else:
            child._modules = _widening_first(parts)
            like = frozenset([*parts, *child._parameters])
            child.__class__ = kinds.setdefault(like, type("Part", (Part,), {}))


def _widening_first(parts: dict[str, nn.Module | None]) -> dict[str, nn.Module | None]:
    """Parts with the linear layers among them in the order of a feed-forward, which files do not keep: the one that
    leads back to the width of the block comes last."""
    widths = {n: part.in_features / part.out_features for n, part in parts.items() if isinstance(part, nn.Linear)}
    turn = iter(sorted(widths, key=widths.__getitem__))
    names = [next(turn) if name in widths else name for name in parts]
    return {name: parts[name] for name in names}
