"""From a layer to its site: which modules can be adapted, and the geometry of each. The table of layer kinds.

A new kind of layer is one entry here (and, where it computes something new, an operation in `site.py`). Subclasses
that compute something of their own are `opaque`: only the module itself can say what it makes of a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd

from nerine.errors import UnsupportedBase
from nerine.model.sharded import is_partitioned, is_split, shape_of
from nerine.model.storage import shape_at, storage_of
from nerine.site import Site

__all__ = [
    "ATTENTION",
    "bias_name",
    "call_site",
    "is_layer",
    "kind_of",
    "layer_kind",
    "parameter_site",
    "plain_forward",
    "projections",
    "site_of",
]

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ATTENTION = nn.MultiheadAttention
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)


def _is_conv1d_of_gpt(module: nn.Module) -> bool:
    """transformers' `Conv1D`: a linear layer that keeps its weight as `[in, out]`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None


def _is_norm(module: nn.Module) -> bool:
    """A normalisation: one of torch's, or anything called so that has a scale and no parts."""
    if isinstance(module, _NORMS):
        return True
    named = "norm" in type(module).__name__.lower()
    return named and "weight" in module._parameters and not module._modules.keys() - {"nerine"}


@dataclass(frozen=True)
class _Kind:
    """One kind of layer: how it is recognised, and how its site is read."""

    name: str
    is_it: Callable[[nn.Module], bool]
    read: Callable[[Any], Site]


def _linear_site(module: nn.Linear) -> Site:
    shape = shape_at(module)
    if storage_of(module, module.weight) is None and shape_of(module.weight) != shape:
        raise UnsupportedBase(f"the weight is packed or sharded: shape {shape_of(module.weight)}")
    return Site("linear", shape)


def _gpt_site(module: Any) -> Site:
    inputs, out = shape_of(module.weight)
    return Site("linear", (out, inputs), flipped=True)


def _embedding_site(module: nn.Embedding) -> Site:
    if module.max_norm is not None:
        raise UnsupportedBase("an embedding with max_norm changes its own weight when it is called")
    tokens, width = shape_of(module.weight)
    return Site("embedding", (width, tokens), flipped=True)


def _norm_site(module: nn.Module) -> Site:
    return Site("norm", shape_of(module.weight), opaque=True)  # type: ignore[arg-type]


def _conv_site(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Site:
    border = tuple(module._reversed_padding_repeated_twice)
    padding = module.padding
    mode: str = module.padding_mode
    zeros = (0,) * len(module.kernel_size)
    if mode != "zeros":
        inner, border_mode = zeros, mode
        border = border if any(border) else ()
    elif isinstance(padding, str):  # "same" may be uneven; "valid" is none
        inner, border_mode = zeros, "constant"
        border = border if padding == "same" and any(border) else ()
    else:
        inner, border, border_mode = tuple(padding), (), "constant"
    shape, stride, dilation = shape_of(module.weight), tuple(module.stride), tuple(module.dilation)
    return Site("conv", shape, stride, inner, dilation, module.groups, border, border_mode)


def _transposed_site(module: _ConvTransposeNd) -> Site:
    shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    return Site(
        "transposed",
        shape,
        tuple(module.stride),
        tuple(module.padding),  # type: ignore[arg-type]
        tuple(module.dilation),
        module.groups,
        output_padding=tuple(module.output_padding),
    )


_KINDS = (
    _Kind("linear", lambda m: isinstance(m, nn.Linear), _linear_site),
    _Kind("linear", _is_conv1d_of_gpt, _gpt_site),
    _Kind("conv", lambda m: isinstance(m, CONVS), _conv_site),
    _Kind("transposed", lambda m: isinstance(m, TRANSPOSED), _transposed_site),
    _Kind("embedding", lambda m: isinstance(m, nn.Embedding), _embedding_site),
    _Kind("norm", _is_norm, _norm_site),
)


def layer_kind(module: nn.Module) -> str:
    """The kind of layer by the name that sites use; empty for any other module."""
    return next((kind.name for kind in _KINDS if kind.is_it(module)), "")


def is_layer(module: nn.Module) -> bool:
    """Whether `module` is of a kind that nerine may adapt (`site_of` tells whether it can)."""
    return bool(layer_kind(module))


def kind_of(module: nn.Module, attr: str = "weight") -> str:
    """A short name of the kind of layer, for tables: Linear, Conv2d 3x3, Conv2d 3x3 g4, Parameter."""
    if attr != "weight":
        return "Parameter"
    known = (nn.Linear, *CONVS, *TRANSPOSED, nn.Embedding, *_NORMS[:3])
    name = next((c.__name__ for c in known if isinstance(module, c)), type(module).__name__)
    if isinstance(module, (*CONVS, *TRANSPOSED)):
        name += " " + "x".join(map(str, module.kernel_size))
        name += f" g{module.groups}" if module.groups > 1 else ""
    return name


def bias_name(attr: str) -> str:
    """The name of the bias that belongs to a weight of that name: weight -> bias, in_proj_weight -> in_proj_bias."""
    return attr.replace("weight", "bias") if "weight" in attr else f"{attr}_bias"


def plain_forward(module: nn.Module) -> bool:
    """Whether the class computes just op(x, weight) + bias, so that a changed weight can stand in for the layer."""
    kind = type(module)
    for conv in CONVS:
        if isinstance(module, conv):
            return kind.forward is conv.forward and kind._conv_forward is conv._conv_forward  # type: ignore[attr-defined]
    for base in (nn.Linear, nn.Embedding, *TRANSPOSED):
        if isinstance(module, base):
            return kind.forward is base.forward  # type: ignore[attr-defined,unused-ignore]
    return _is_conv1d_of_gpt(module) or (isinstance(module, _NORMS) and any(kind.forward is b.forward for b in _NORMS))


def site_of(module: nn.Module, where: str = "layer") -> Site:
    """The site of the layer `module`; `where` names it in errors.

    Raises:
        UnsupportedBase: no layer of a known kind, or a weight that is missing or stored in an unknown way.
    """
    kind = next((kind for kind in _KINDS if kind.is_it(module)), None)
    if kind is None:
        raise UnsupportedBase(
            f"{where}: expected a Linear, Conv, ConvTranspose, Embedding or normalisation layer, "
            f"found {type(module).__name__}"
        )
    is_stored = _check_weight(module, module.weight, kind.name, where)
    try:
        site = kind.read(module)
    except UnsupportedBase as error:
        raise UnsupportedBase(f"{where}: {error}") from None
    site = replace(site, has_bias=getattr(module, "bias", None) is not None)
    # the class of a quantised layer is trusted: its own rounding would make a trial fail
    if not site.opaque and not is_stored and not plain_forward(module) and not _behaves_like(module, site):
        site = replace(site, opaque=True)
    if site.opaque and is_split(module.weight):
        raise UnsupportedBase(f"{where}: {_SPLIT}")
    return site


_SPLIT = "its weight is split over processes, which only plain Linear and Embedding layers can have adapters on"


def _check_weight(module: nn.Module, weight: object, kind: str, where: str) -> bool:
    """Whether the weight is stored in a form of its own.

    Raises:
        UnsupportedBase: there is none, or one that cannot be read, or not by this kind of layer.
    """
    if weight is None:
        raise UnsupportedBase(f"{where}: it has no weight of its own" + (" to move" if kind == "norm" else ""))
    found = getattr(weight, "dtype", type(weight).__name__)
    storage = storage_of(module, weight)
    if storage is not None and kind in ("norm", "parameter") and not is_split(weight):
        raise UnsupportedBase(
            f"{where}: a {kind} is adapted by exchanging its weight, which here is stored as {storage.name} ({found}); "
            "leave it in bf16 or fp32 when the model is quantised"
        )
    if storage is None and (
        not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dtype.itemsize < 2
    ):
        raise UnsupportedBase(
            f"{where}: expected a weight of fp16, bf16, fp32 or fp64, or a known way to quantise it "
            f"(docs/quantised-bases.md), found {type(weight).__name__} of {found}"
        )
    return storage is not None


@torch.no_grad()
def _behaves_like(module: nn.Module, site: Site) -> bool:
    """Whether a class with a forward of its own computes op(x, weight) + bias all the same, by trying it."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if weight.is_meta or is_partitioned(weight):
        return site.kind == "linear"
    if site.kind == "embedding":
        x = torch.arange(min(4, site.shape[1]), device=weight.device)
    else:
        room = [2 * (k - 1) * d + 3 for k, d in zip(site.kernel, site.dilation, strict=True)]
        count = (1 if site.kernel else 2) * site.groups * site.shape[1] * max(1, torch.Size(room).numel())
        x = torch.linspace(-1, 1, count, dtype=weight.dtype, device=weight.device).sin()
        x = x.reshape(1 if site.kernel else 2, site.groups * site.shape[1], *room)
    try:
        got = type(module).forward(module, x)
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        return False  # it wants other arguments: then it is no such layer
    want = site.op(x, site.canonical(weight), getattr(module, "bias", None))
    return isinstance(got, Tensor) and got.shape == want.shape and bool(torch.allclose(got, want, rtol=1e-2, atol=1e-3))


def call_site(module: nn.Module, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Site:
    """`site` for one call: a transposed convolution may be asked for an output size."""
    size = kwargs.get("output_size", args[1] if len(args) > 1 else None)
    if size is None or not isinstance(module, _ConvTransposeNd):
        return site
    x, dims = args[0] if args else kwargs["input"], len(site.kernel)
    geometry = (list(v) for v in (module.stride, module.padding, module.kernel_size))
    padding = module._output_padding(x, size, *geometry, dims, list(module.dilation))  # type: ignore[arg-type,call-arg]
    return replace(site, output_padding=tuple(padding))


# -- weights that no layer of their own calls ---------------------------------------------------------------------
def projections(attention: nn.MultiheadAttention) -> list[tuple[str, nn.Module, str]]:
    """The weights of an attention block: (path within it, module that holds the weight, its name there).

    Its forward hands them to one function and calls no layer, so that only the attention itself can use changed ones.
    """
    own = ["in_proj_weight"] if attention._qkv_same_embed_dim else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    return [*((name, attention, name) for name in own), ("out_proj", attention.out_proj, "weight")]


def parameter_site(module: nn.Module, attr: str, where: str) -> Site:
    """The site of a parameter that stands alone: `[out, in]`, or `[experts, out, in]`.

    Raises:
        UnsupportedBase: it is no floating-point parameter of two or three dimensions.
    """
    weight = module._parameters.get(attr)
    _check_weight(module, weight, "parameter", where)
    assert weight is not None
    if is_split(weight):
        raise UnsupportedBase(f"{where}: {_SPLIT}")
    shape = shape_of(weight)
    if len(shape) not in (2, 3):
        raise UnsupportedBase(f"{where}: expected a parameter of 2 or 3 dimensions, found {shape}")
    bias = module._parameters.get(bias_name(attr))
    has_bias = len(shape) == 2 and bias is not None and bias.dim() == 1
    experts = shape[0] if len(shape) == 3 else 0
    return Site("linear", shape[-2:], has_bias=has_bias, opaque=True, experts=experts)
