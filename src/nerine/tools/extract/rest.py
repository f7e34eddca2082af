"""What else has changed between two checkpoints, for which an adapter file has no place or was not to have one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nerine.algorithms import Full
from nerine.ops.precision import wide
from nerine.tools.extract.choice import Choice
from nerine.tools.extract.noise import differs, square
from nerine.tools.extract.pairs import Pair, Pairs, is_layer
from nerine.tools.weights import Weights

__all__ = ["Rest", "look_at"]


@dataclass(frozen=True)
class Rest:
    """How many norms have changed and by how much of their size, and a line for each other kind of thing."""

    norms: int
    norm_change: float
    notes: tuple[str, ...]


def look_at(pairs: Pairs, choice: Choice) -> Rest:
    """Everything that was not chosen and is no layer that could have been."""
    norms, change, size = 0, 0.0, 0.0
    counts = {"embedding": 0, "parameter": 0}
    for path, pair in pairs.layers.items():
        if path in choice.algorithms or is_layer(pairs.base, path):
            continue
        moved, whole = _moved(pair)
        if pair.site.kind == "norm":
            norms, change, size = norms + bool(moved), change + moved, size + (whole if moved else 0.0)
        elif moved:
            counts["embedding" if pair.site.kind == "embedding" else "parameter"] += 1
    notes = []
    if counts["embedding"]:
        notes.append(f"{counts['embedding']} embeddings changed and were left out; algorithm full takes them")
    if counts["parameter"]:
        notes.append(f"{counts['parameter']} parameters outside of layers changed and were left out")
    notes += [note for note in [_of_vae(pairs.base, pairs.tuned)] if note]
    unlike = len(pairs.unlike)
    if unlike:
        some = ", ".join(pairs.unlike[:2])
        notes.append(f"{unlike} tensors that cannot have adapters have no counterpart of their shape ({some})")
    if isinstance(next(iter(choice.algorithms.values()), None), Full):
        notes = [note for note in notes if "algorithm full takes" not in note]
    return Rest(norms, math.sqrt(change / size) if size else 0.0, (*pairs.notes, *notes))


def _moved(pair: Pair) -> tuple[float, float]:
    """|D|² and |W|² of a scale and its offset; zero where nothing has moved."""
    weight, target = pair.weight(), pair.target()
    moved = square(target - weight) if differs(weight, target, pair.formats) else 0.0
    bias, shift = pair.base.bias(pair.path), pair.shift()
    if bias is None or shift is None:
        return moved, square(weight)
    offset = differs(wide(bias), wide(bias) + shift, pair.formats)
    return moved + (square(shift) if offset else 0.0), square(weight) + square(bias)


def _of_vae(base: Weights, tuned: Weights) -> str:
    """Whether the autoencoders differ, of which adapters know nothing; by the names that both have."""
    here, there = (_named(weights) for weights in (base, tuned))
    both = [name for name in here if name in there]
    changed = 0
    for name in both:
        a, b = base.file.read(here[name]), tuned.file.read(there[name])
        same = a.shape == b.shape and not differs(wide(a), wide(b), (a.dtype, b.dtype))
        changed += not same
    if changed:
        return f"the vae differs in {changed} of {len(both)} tensors; adapters have no place for it"
    return ""


def _named(weights: Weights) -> dict[str, str]:
    """{name within the autoencoder: name in the file}."""
    floating = [key for key in weights.file.keys if weights.file.dtype(key).is_floating_point]
    leads = ("first_stage_model.", "vae.")
    return {key[len(lead) :]: key for key in floating for lead in leads if key.startswith(lead)}
