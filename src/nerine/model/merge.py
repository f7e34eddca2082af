"""Merging: adapters into the weight, as one sum in at least fp32 that is rounded once, and the exact bits back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nerine.errors import MergeError
from nerine.model.mount import (
    Mount,
    adapters_of,
    bias_at,
    dtype_at,
    keep_original,
    settle,
    weight_at,
    write,
    write_back,
)
from nerine.model.storage import storage_of
from nerine.model.sums import Share, changed, summed_bias
from nerine.ops.precision import full_precision, wide

__all__ = ["changed_weight", "check_unchanged", "forget_original", "merge_layer", "unmerge_layer"]


def changed_weight(holder: nn.Module, mount: Mount, names: set[str]) -> tuple[Tensor, Tensor | None]:
    """W + Σ strength·(W' - W) over the adapters `names`, as one sum in at least fp32; the bias likewise."""
    settle(holder, mount)
    weight, bias = wide(weight_at(holder, mount).detach()), bias_at(holder, mount)
    bias = None if bias is None else wide(bias.detach())
    with torch.no_grad(), full_precision(weight):
        shares: list[Share] = []
        for name, adapter in adapters_of(holder, mount):
            if name in names and adapter.strength:
                shares.append((adapter, adapter.ready(weight.device), adapter.strength))
        return changed(weight, shares), summed_bias(shares, bias)


def merge_layer(holder: nn.Module, mount: Mount, names: set[str]) -> tuple[float, float]:
    """Put the adapters `names` into the weight, rounded once; returns the largest and the relative rounding error.

    Raises:
        MergeError: one of them is merged already, another active adapter reads the weight, or another module shares it.
    """
    names = names & {name for name, _ in adapters_of(holder, mount)}
    if mount.merged:
        both = ", ".join(sorted(mount.merged))
        raise MergeError(f"{mount.path}: {both} is merged already; unmerge before merging again")
    if mount.shared_with:
        raise MergeError(
            f"{mount.path} shares its weight with {mount.shared_with}, which a merge would change as well; "
            "give the two a weight of their own first, or leave the layer out"
        )
    others = sorted(n for n, a in adapters_of(holder, mount) if n not in names and n not in mount.off and a.strength)
    if others:
        raise MergeError(
            f"{mount.path}: {', '.join(others)} is applied to the weight that would change under it; merge both "
            "together with Network.of(model).merge(), or take it off first"
        )
    weight = wide(weight_at(holder, mount).detach().clone())
    exact, shifted = changed_weight(holder, mount, names)
    keep_original(holder, mount)
    write(holder, mount, exact, shifted)
    rounded = wide(weight_at(holder, mount).detach())
    if not torch.isfinite(rounded).all():
        write_back(holder, mount)
        storage = storage_of(holder, holder._parameters[mount.attr])
        form = dtype_at(holder, mount) if storage is None else storage.name
        raise MergeError(f"{mount.path}: the merged weight is not finite in {form}; is the adapter damaged?")
    step, error = exact - weight, rounded - exact
    mount.merged = {name: a.strength for name, a in adapters_of(holder, mount) if name in names}
    mount.fingerprint = _fingerprint_of(holder, mount)
    return float(error.abs().max()), float(error.norm() / step.norm().clamp_min(1e-30))


def _fingerprint_of(holder: nn.Module, mount: Mount) -> tuple[torch.dtype, int] | None:
    """The number format of a weight and the sum of its bits as integers, which is the same on every device; None
    where it is no tensor of plain numbers in memory."""
    own = holder._parameters[mount.attr]
    if type(own) is not nn.Parameter or own.is_meta or storage_of(holder, own) is not None or hasattr(own, "ds_id"):
        return None
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[own.dtype.itemsize]
    return own.dtype, int(weight_at(holder, mount).detach().contiguous().view(bits).sum(dtype=torch.int64))


def check_unchanged(holder: nn.Module, mount: Mount) -> None:
    """Whether the old bits may take the place of a merged weight.

    Raises:
        MergeError: another program has changed the weight since, which they would undo without a word.
    """
    before = mount.fingerprint
    now = None if before is None or mount.original is None else _fingerprint_of(holder, mount)
    if before is not None and now is not None and before[0] == now[0] and before != now:
        raise MergeError(
            f"{mount.path}: its weight was changed after the merge, by training or by another merge, and the bits from "
            "before would undo that as well. Undo that first, or make this merge final: "
            "network.merge(keep_original=False)"
        )


def forget_original(mount: Mount) -> None:
    """Make a merge final: the old bits are dropped."""
    mount.original = None


def unmerge_layer(holder: nn.Module, mount: Mount, names: set[str]) -> None:
    """Give the weight back its exact bits.

    Raises:
        MergeError: it was merged without keeping them.
    """
    if not mount.merged or not (names & set(mount.merged)):
        return
    if mount.original is None:
        raise MergeError(f"{mount.path}: it was merged with keep_original=False, so the original bits are gone")
    write_back(holder, mount)
    mount.merged = {}
