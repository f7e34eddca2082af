"""Trained tensors away from where they start, the same at each call."""

from __future__ import annotations

from typing import Any

import torch


def stir(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
