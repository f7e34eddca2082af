"""From a layer to its site: which modules can be adapted, and the geometry of each. The table of layer kinds.

A new kind of layer is one entry here (and, where it computes something new, an operation in `site.py`).
"""

from __future__ import annotations

from torch import Tensor, nn

from nerine.errors import UnsupportedBase
from nerine.site import Site

__all__ = ["CONVS", "bias_of", "is_layer", "kind_of", "plain_forward", "site_of", "weight_of"]

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of an adapted layer."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight


def bias_of(layer: nn.Module) -> Tensor | None:
    """The bias of an adapted layer, or None."""
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    return bias


def is_layer(module: nn.Module) -> bool:
    """Whether `module` is of a kind that nerine may adapt (`site_of` tells whether it can)."""
    return isinstance(module, (nn.Linear, *CONVS))


def kind_of(module: nn.Module) -> str:
    """A short name of the kind of layer, for tables: Linear, Conv2d 3x3, Conv2d 3x3 g4."""
    name = next((c.__name__ for c in (nn.Linear, *CONVS) if isinstance(module, c)), type(module).__name__)
    if isinstance(module, CONVS):
        name += " " + "x".join(map(str, module.kernel_size))
        name += f" g{module.groups}" if module.groups > 1 else ""
    return name


def plain_forward(module: nn.Module) -> bool:
    """Whether the class computes just op(x, weight) + bias, so that a changed weight can stand in for the layer."""
    kind = type(module)
    if isinstance(module, nn.Linear):
        return kind.forward is nn.Linear.forward
    for base in CONVS:
        if isinstance(module, base):
            return kind.forward is base.forward and kind._conv_forward is base._conv_forward  # type: ignore[attr-defined]
    return False


def site_of(module: nn.Module, where: str = "layer") -> Site:
    """The site of `module`; `where` names it in errors.

    Raises:
        UnsupportedBase: not a linear or convolution layer, a packed weight, or a convolution that pads by itself.
    """
    if not is_layer(module):
        raise UnsupportedBase(f"{where}: expected a Linear or Conv1d/2d/3d layer, found {type(module).__name__}")
    weight = module.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        found = getattr(weight, "dtype", type(weight).__name__)
        raise UnsupportedBase(
            f"{where}: expected a weight of fp16, bf16, fp32 or fp64, found {found}; "
            "quantised bases are not supported yet"
        )
    if isinstance(module, nn.Linear):
        if tuple(weight.shape) != (module.out_features, module.in_features):
            raise UnsupportedBase(f"{where}: the weight is packed or sharded: shape {tuple(weight.shape)}")
        return Site("linear", tuple(weight.shape))
    if not plain_forward(module):
        raise UnsupportedBase(
            f"{where}: {type(module).__name__} overrides the convolution's forward, so its padding is unknown"
        )
    assert isinstance(module, CONVS)
    return _conv_site(module)


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
    return Site(
        "conv",
        tuple(module.weight.shape),
        tuple(module.stride),
        inner,
        tuple(module.dilation),
        module.groups,
        border,
        border_mode,
    )
