"""What programs compute that read an adapter otherwise than it was trained, and how far off that is.

comfy-dora    W' = V·m/|W|          the norm of the base in place of that of V
input-norm    W' = V·m/|V|_in       magnitudes of outputs, norms of inputs
no-magnitude  W' = V                the magnitudes left out
comfy-oft     the bound of a rotation taken without the number of outputs, and no rescale of Diag-OFT
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nerine.algorithms import Algorithm, DiagOFT, DoRA, Params
from nerine.files.checkpoint import Record
from nerine.ops.precision import wide

__all__ = ["FORMULAS", "deviation"]


def deviation(formula: str, record: Record, weight: Tensor) -> float:
    """|W'read - W'| / |W' - W| over all entries of a layer."""
    weight = wide(weight)
    params = record.params.filled(wide(t) for t in record.params.tensors.values())
    trained = record.algorithm.weight(params, weight)
    read = FORMULAS[formula](record.algorithm, params, weight)
    moved = float((trained - weight).norm())
    return float((read - trained).norm()) / max(moved, 1e-30)


def _inner(algorithm: Algorithm, params: Params, weight: Tensor) -> tuple[Tensor, Tensor]:
    """V and the magnitudes, in the shape in which they multiply it."""
    assert isinstance(algorithm, DoRA)
    magnitude = params.tensors["magnitude"]
    shape = [1] * weight.dim()
    shape[0 if algorithm.axis == "out" else 1] = -1
    return algorithm.inner.weight(params.without("magnitude"), weight), magnitude.reshape(shape)


def _comfy_dora(algorithm: Algorithm, params: Params, weight: Tensor) -> Tensor:
    v, m = _inner(algorithm, params, weight)
    norm: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1).reshape(m.shape)
    return v * (m / (norm + torch.finfo(weight.dtype).eps))


def _input_norm(algorithm: Algorithm, params: Params, weight: Tensor) -> Tensor:
    v, m = _inner(algorithm, params, weight)
    norm: Tensor = torch.linalg.vector_norm(v.transpose(0, 1).flatten(1), dim=1).reshape(1, -1, *[1] * (v.dim() - 2))
    return v * (m / norm)


def _no_magnitude(algorithm: Algorithm, params: Params, weight: Tensor) -> Tensor:
    return _inner(algorithm, params, weight)[0]


def _comfy_oft(algorithm: Algorithm, params: Params, weight: Tensor) -> Tensor:
    if isinstance(algorithm, DiagOFT):
        params = params.without("rescale")
    return algorithm.weight(params._replace(scale=params.scale / weight.shape[0]), weight)


FORMULAS: Mapping[str, Callable[[Algorithm, Params, Tensor], Tensor]] = {
    "comfy-dora": _comfy_dora,
    "input-norm": _input_norm,
    "no-magnitude": _no_magnitude,
    "comfy-oft": _comfy_oft,
}
