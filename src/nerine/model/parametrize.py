"""An adapter as a torch parametrization: `layer.weight` itself gives the changed weight, whoever reads it.

For code that uses a weight without calling its layer. It costs a built weight for each read, and in half precision the
sum with the base is rounded, so that `attach` is the better way wherever a layer is called.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as torch_parametrize

from nerine.algorithms import Algorithm
from nerine.errors import OptionError, TargetError, UnsupportedBase
from nerine.model.adapter import Adapter, check_strength, start
from nerine.model.layer import bias_name, is_layer, parameter_site, site_of
from nerine.model.sums import changed
from nerine.ops.precision import full_precision, same_dtype, wide

__all__ = ["parametrize"]


class Changed(nn.Module):
    """W -> W + strength·(W' - W), as `torch.nn.utils.parametrize` calls it."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, weight: Tensor) -> Tensor:
        adapter = self.adapter
        if not adapter.strength:
            return weight
        canonical = adapter.site.canonical(weight)
        p = adapter(canonical).params
        with full_precision(canonical):
            base = wide(canonical)
            total = changed(base, [(adapter, p, adapter.call_strength(base))])
        return same_dtype(adapter.site.native(total), weight)


def parametrize(
    module: nn.Module,
    name: str,
    algorithm: Algorithm,
    *,
    strength: float = 1.0,
    generator: torch.Generator | None = None,
) -> Adapter:
    """Make `module.name` the weight that `algorithm` makes of it; returns the adapter, whose parameters are trained.

    The parameter has two dimensions `[out, in]`, three `[experts, out, in]` (an adapter for each expert), or is the
    weight of a layer of any kind. The original is frozen under `module.parametrizations.name.original`;
    `torch.nn.utils.parametrize.remove_parametrizations` takes the adapter off again, leaving the changed weight or not.

    Raises:
        TargetError: the module has no parameter of that name.
        UnsupportedBase: the parameter cannot be adapted, or not by this algorithm.
    """
    if not isinstance(algorithm, Algorithm):
        raise OptionError(f"parametrize: expected an algorithm such as LoRA(rank=16), got {algorithm!r}")
    check_strength(strength)
    weight = module._parameters.get(name)
    if weight is None:
        known = ", ".join(key for key, p in module.named_parameters(recurse=False)) or "none"
        raise TargetError(f"{type(module).__name__} has no parameter {name!r}. Its parameters: {known}")
    is_weight = name == "weight" and is_layer(module)
    site = site_of(module, name) if is_weight else parameter_site(module, name, name)
    why = algorithm.unsuited(site)
    if why:
        raise UnsupportedBase(f"{name}: {why}")
    params = start(algorithm, site, site.canonical(weight.detach()), generator)
    adapter = Adapter(algorithm, site, params, strength=strength, where=name).train(module.training)
    if algorithm.shift(adapter.params()) is not None:
        raise OptionError(f"{algorithm} moves {bias_name(name)} as well, which is no part of {name}: set bias=False")
    weight.requires_grad_(False)
    torch_parametrize.register_parametrization(module, name, Changed(adapter))
    return adapter
