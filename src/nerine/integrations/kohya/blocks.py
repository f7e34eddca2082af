"""The numbered blocks of SD's UNets, by which sd-scripts sets ranks and learning rates.

SD 1 and 2 have 25 (12 down, 1 middle, 12 up), SDXL 23 (embeddings, 9 down, 3 middle, 9 up, output).
Source: sd-scripts `networks/lora.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nerine.errors import OptionError, nearest

__all__ = ["Blocks"]

_DIFFUSERS = re.compile(r"^(down|up)_blocks\.(\d+)\.(resnets|attentions|upsamplers|downsamplers)\.(\d+)\.")
_NATIVE = {"time_embed": 0, "label_emb": 0, "input_blocks": 1, "middle_block": 10, "output_blocks": 13, "out": 22}
_CURVES = ("cosine", "sine", "linear", "reverse_linear", "zeros")


class Blocks:
    """How the layers of one UNet fall into blocks."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.is_sdxl = any(path.startswith("input_blocks.") for path in paths)
        self.side, self.middle = (9, 3) if self.is_sdxl else (12, 1)
        self.count = 23 if self.is_sdxl else 25

    def of(self, path: str) -> int:
        """The number of a layer's block; -1 for layers that are in none."""
        if self.is_sdxl:
            first, _, rest = path.partition(".")
            number = rest.split(".")[0]
            inside = first.endswith(("_blocks", "_block")) and number.isdigit()
            return _NATIVE[first] + (int(number) if inside else 0) if first in _NATIVE else -1
        if path.startswith("mid_block."):
            return 12
        found = _DIFFUSERS.match(path)
        if found is None:
            return -1
        side, outer, kind, inner = found.groups()
        place = 3 * int(outer) + (2 if kind.endswith("samplers") else int(inner))
        return 1 + place if side == "down" else 13 + place

    def listed(self, name: str, values: Sequence[Any] | None) -> Sequence[Any] | None:
        """One value a block.

        Raises:
            OptionError: there are more or fewer.
        """
        if values is not None and len(values) != self.count:
            raise OptionError(f"{name}: expected {self.count} values, one a block of this UNet, got {len(values)}")
        return values

    def lr_weights(self, given: Mapping[str, Any]) -> list[float] | None:
        """The multiple of the learning rate of each block; None where nothing is said of it.

        Raises:
            OptionError: too many values, or an unknown curve.
        """
        down, mid, up = (given.get(f"{side}_lr_weight") for side in ("down", "mid", "up"))
        if down is None and mid is None and up is None:
            return None
        threshold = given.get("block_lr_zero_threshold") or 0.0
        parts = [
            self._part("down_lr_weight", down, self.side, threshold),
            self._part("mid_lr_weight", mid, self.middle, threshold),
            self._part("up_lr_weight", up, self.side, threshold),
        ]
        both = [weight for part in parts for weight in part]
        return [1.0, *both, 1.0] if self.is_sdxl else both

    @staticmethod
    def _part(name: str, given: list[float] | str | None, count: int, threshold: float) -> list[float]:
        if given is None:
            return [1.0] * count
        weights = _curve(name, given, count) if isinstance(given, str) else list(given)
        if len(weights) > count:
            raise OptionError(f"{name}: expected {count} values at most, one a block, got {len(weights)}")
        weights += [1.0] * (count - len(weights))
        return [weight if weight > threshold else 0.0 for weight in weights]


def _curve(name: str, text: str, count: int) -> list[float]:
    """ "sine+0.25": a curve over the blocks, and what is added to it."""
    curve, _, more = text.partition("+")
    curve = curve.strip()
    try:
        base = float(more or 0)
    except ValueError:
        base = math.nan
    if curve not in _CURVES or math.isnan(base):
        raise OptionError(
            f"{name}: expected numbers or a curve such as sine+0.25, got {text!r}. {nearest(curve, _CURVES)}"
        )
    steps = [i / (count - 1) for i in range(count)]
    values = {
        "sine": [math.sin(math.pi * step / 2) for step in steps],
        "cosine": [math.sin(math.pi * step / 2) for step in reversed(steps)],
        "linear": steps,
        "reverse_linear": steps[::-1],
        "zeros": [0.0] * count,
    }[curve]
    return [value + base for value in values]
