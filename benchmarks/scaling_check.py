"""A small Flux on the CPU, in earnest: what autograd keeps there, beside what counting without values says."""

from __future__ import annotations

from typing import Any

import torch
from scaling_counts import AsOnCuda, Shape, count_kept, flux, inputs
from scaling_memory import ALGORITHMS, ALL, adapt

__all__ = ["SMALL", "check", "kept_of_blocks"]

SMALL = Shape(heads=4, head=64, double=2, single=2, image=512, text=64, context=256)


def kept_of_blocks(name: str, shape: Shape, device: str) -> float:
    """Bytes kept by as many further blocks as `shape` has, beyond a model of one block of each kind."""
    found = []
    for double, single in ((1, 1), (1 + shape.double, 1 + shape.single)):
        model = flux(shape, double, single, device)
        if device != "meta":
            for parameter in model.parameters():
                parameter.data.normal_(0, 0.02)
        adapt(name)(model)
        given: dict[str, Any] = inputs(shape, model, device)
        if device == "meta":
            with AsOnCuda(fused_norms=False):  # RMS norms are composed on the CPU
                found.append(count_kept(model, given))
        else:
            found.append(count_kept(model, given))
    return found[1] - found[0]


def check() -> dict[str, dict[str, float]]:
    """Bytes that the blocks of the small model keep: measured, and counted without computing."""
    torch.manual_seed(0)
    return {
        name: {"measured": kept_of_blocks(name, SMALL, "cpu"), "counted": kept_of_blocks(name, SMALL, "meta")}
        for name in (*ALGORITHMS, ALL)
    }
