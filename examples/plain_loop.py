"""Adapters in a plain PyTorch loop: a reader of white digits on black learns to read blue ones on cream.

    pip install -e ".[train]"
    python examples/plain_loop.py

The reader is a small convolutional network that comes with nerine and was trained on real handwriting. Shown pictures
in which light and dark are exchanged, it guesses; a few seconds of DoRA(LoKr) teach it, and its weights stay.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nerine
from nerine.tiny import Judge, style_set


def pictures(style: str) -> tuple[Tensor, Tensor]:
    """Grey pictures `[n, 1, 16, 16]` in [0, 1] and their digits, of which every second one is for training."""
    data = style_set(style)
    both = torch.cat([data.train.pictures, data.held_out.pictures])
    return (both.mean(1, keepdim=True) + 1) / 2, torch.cat([data.train.digits, data.held_out.digits])


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, digits: Tensor) -> float:
    return float((model(inputs).argmax(1) == digits).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Judge().reader
    plain, new = pictures("plain"), pictures("paper")
    train, test = ([t[start::2] for t in new] for start in (0, 1))
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    print(f"white on black {accuracy(model, *plain):.0%}, blue on cream {accuracy(model, *test):.0%}")

    network = nerine.attach(model, nerine.DoRA(nerine.LoKr(rank=4, factor=4)))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(options.steps):
        chosen = torch.randint(len(train[0]), (32,))
        loss = F.cross_entropy(model(train[0][chosen]), train[1][chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = accuracy(model, *test)
    print(f"{network}: blue on cream {trained:.0%}")

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected = model(test[0])
        file = Path(folder) / "paper.safetensors"
        nerine.save(network, file)
        fresh = Judge().reader
        other = nerine.load(fresh, file, strict=True)
        apart = float((fresh(test[0]) - expected).abs().max())
        print(f"{file.stat().st_size / 1e3:.0f} kB; read again: {apart:.1e} apart")
        other.merge(keep_original=False)
        other.detach()
        print(f"merged into plain weights: {float((fresh(test[0]) - expected).abs().max()):.1e} apart")
    with network.at_strength(0.5):
        print(f"at half the strength {accuracy(model, *test):.0%}")
    network.detach()
    same = all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    print(f"taken off, the weights are as they were: {same}; white on black {accuracy(model, *plain):.0%}")


if __name__ == "__main__":
    main()
