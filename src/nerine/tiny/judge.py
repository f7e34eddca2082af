"""A very small reader of handwritten digits: it says which digit a picture shows, so results can be counted.

Trained on the plain strokes of real digits alone, never on drawn samples and never in a style; a styled picture
is first turned back into strokes. Knows nothing of the model that drew the picture.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from nerine.tiny import styles

WEIGHTS = Path(__file__).parent / "judge.safetensors"


class Reader(nn.Module):
    """Strokes `[n, 1, 16, 16]` in [0, 1] to ten scores `[n, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Conv2d(1, 16, 3, padding=1)
        self.mid = nn.Conv2d(16, 32, 3, padding=1)
        self.high = nn.Conv2d(32, 48, 3, padding=1)
        self.score = nn.Linear(48 * 4, 10)

    def forward(self, strokes: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.low(strokes)), 2)  # [n, 16, 8, 8]
        x = F.max_pool2d(F.relu(self.mid(x)), 2)  # [n, 32, 4, 4]
        x = F.max_pool2d(F.relu(self.high(x)), 2)  # [n, 48, 2, 2]
        scores: Tensor = self.score(x.flatten(1))
        return scores


class Judge:
    """Reads digits. `real_accuracy` is its share of right answers on real digits not seen in its training."""

    real_accuracy: float

    def __init__(self, weights: Path = WEIGHTS) -> None:
        with safe_open(str(weights), framework="pt") as file:
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
            self.real_accuracy = float(json.loads(file.metadata()["report"])["real_accuracy"])
        self.reader = Reader().eval().requires_grad_(False)
        self.reader.load_state_dict(tensors)

    @torch.no_grad()
    def read(self, pictures: Tensor, style: str = "plain") -> Tensor:
        """The digit `[n]` int64 that each picture `[n, 3, 16, 16]` in [-1, 1] shows, read in that style.

        *Raises* OptionError for an unknown style.
        """
        scores: Tensor = self.reader(styles.read(pictures.detach().cpu(), style))
        return scores.argmax(1)

    def accuracy(self, pictures: Tensor, digits: Tensor, style: str = "plain") -> float:
        """The share of pictures that show their digit, in [0, 1]."""
        return float((self.read(pictures, style) == digits.cpu()).double().mean())


def colour_distance(pictures: Tensor, reference: Tensor) -> float:
    """Mean distance of the average colours of two sets of pictures, in units of [-1, 1]; 0 = the same."""
    found, expected = (p.detach().float().cpu().mean((0, 2, 3)) for p in (pictures, reference))
    return float((found - expected).abs().mean())
