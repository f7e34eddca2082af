"""LyCORIS's functional module: its functions over bare tensors, with their names, arguments and shapes.

Each file has the functions of one algorithm: `weight_gen` makes fresh tensors, `diff_weight` the change of a weight,
`bypass_forward_diff` the change of a layer's output. `gamma` is the factor of the change. Fresh tensors are on the
device of the weight that they are made for, in at least fp32. `backend` is checked and changes nothing: there is one
way to compute here, and no environment variable is read.
"""

from nerine.integrations.lycoris.functional.general import (
    FUNC_LIST,
    add_scaled,
    apply_dora_scale,
    factorization,
    power2factorization,
    rebuild_tucker,
    tucker_weight,
    tucker_weight_from_conv,
    weight_decompose,
)

__all__ = [
    "FUNC_LIST",
    "add_scaled",
    "apply_dora_scale",
    "factorization",
    "power2factorization",
    "rebuild_tucker",
    "tucker_weight",
    "tucker_weight_from_conv",
    "weight_decompose",
]
