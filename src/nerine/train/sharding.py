"""A denoiser in pieces: with FSDP2 each process keeps a share of every block and borrows the rest while it computes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from nerine.errors import OptionError

__all__ = ["check_shared", "shard"]


def shard(denoiser: nn.Module, device: torch.device) -> None:
    """Split the denoiser, adapters and all, over the processes: each of its blocks a unit of its own, then the rest.

    Adapters must be on it already, and the optimiser must be made afterwards: the parameters are others then.

    Raises:
        OptionError: there is only one process.
    """
    check_shared()
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks_of(denoiser):
        fully_shard(block, mesh=mesh)
    fully_shard(denoiser, mesh=mesh)


def check_shared() -> None:
    """Raises OptionError where there is only one process."""
    if not dist.is_initialized() or dist.get_world_size() < 2:
        raise OptionError("shard: there is one process, which cannot share; start several, as with accelerate launch")


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """The repeated parts of a denoiser: what its longest lists of modules hold, outermost first."""
    return [block for part in denoiser.children() if isinstance(part, nn.ModuleList) for block in part]
