"""Trained tensors away from where they start, the same at each call."""

from __future__ import annotations

from typing import Any

import torch


def stir(parameters: Any, seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
