"""T-LoRA's masks, as LyCORIS passes them: a training loop tells a module function, which knows no network.

    lycoris.set_timestep_mask(lycoris.compute_timestep_mask(t, 1000, max_rank=16))
    loss = ...  # every T-LoRA of the group takes part with the ranks of the mask
    lycoris.clear_timestep_mask()

That is why `MASKS` is here, the one exception to the rule that the library keeps no state of its own. It is one for the
process and not for a thread or a context: under gradient checkpointing the backward pass calls the layers again from
autograd's threads, and they must find the mask that the forward pass found. Who can, tells `Network.set_timestep`
instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nerine.errors import OptionError, ShapeError

__all__ = [
    "MASKS",
    "Masks",
    "clear_timestep_mask",
    "compute_timestep_mask",
    "get_timestep_mask",
    "mask_for",
    "set_timestep_mask",
]


class Masks:
    """The mask of each group of networks, if it has one."""

    def __init__(self) -> None:
        self._of_group: dict[int, Tensor] = {}

    def put(self, mask: Tensor, group_id: int = 0) -> None:
        """Raises `ShapeError` for what is no mask of ranks."""
        if not isinstance(mask, Tensor) or mask.dim() not in (1, 2):
            found = tuple(mask.shape) if isinstance(mask, Tensor) else mask
            raise ShapeError(f"timestep mask: expected a tensor [rank], [1, rank] or [batch, rank], got {found!r}")
        self._of_group[group_id] = mask

    def get(self, group_id: int = 0) -> Tensor | None:
        return self._of_group.get(group_id)

    def clear(self, group_id: int = 0) -> None:
        self._of_group.pop(group_id, None)


MASKS = Masks()


def set_timestep_mask(mask: Tensor, group_id: int = 0) -> None:
    """Let only the ranks of `mask` `[1, rank]` or `[batch, rank]` take part, until it is cleared or another is set.

    Networks made with `mask_group_id` listen to their own group.

    Raises:
        ShapeError: it is no such tensor.
    """
    MASKS.put(mask, group_id)


def get_timestep_mask(group_id: int = 0) -> Tensor | None:
    """The mask of a group, None where all ranks take part."""
    return MASKS.get(group_id)


mask_for = get_timestep_mask


def clear_timestep_mask(group_id: int = 0) -> None:
    """Let all ranks of a group take part again."""
    MASKS.clear(group_id)


def compute_timestep_mask(
    timestep: float, max_timestep: float, max_rank: int, min_rank: int = 1, alpha: float = 1.0
) -> Tensor:
    """Ones for the ranks that take part at a timestep, `[1, max_rank]`: the first ((T - t)/T)^alpha·(max - min) + min.

    All of them at 0, `min_rank` at `max_timestep`, where there is most noise.

    Raises:
        OptionError: the timestep is not between 0 and `max_timestep`.
    """
    if not 0 <= timestep <= max_timestep or not max_timestep > 0:
        raise OptionError(f"timestep: expected a number from 0 to max_timestep {max_timestep}, got {timestep}")
    left = (float(max_timestep) - float(timestep)) / float(max_timestep)
    active = min(int(left**alpha * (max_rank - min_rank)) + min_rank, max_rank)
    mask = torch.zeros((1, max_rank))
    mask[:, :active] = 1.0
    return mask
