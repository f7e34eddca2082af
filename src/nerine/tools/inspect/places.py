"""Where a layer stands in its model, by its path alone: the part of the pipeline, the block, and what kind of layer of
the block it is; and the order in which models run through their blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from nerine.files.resolve import component_of

__all__ = ["Spot", "kinds_in_order", "order_of", "spot_of"]

# Words whose number is that of a block; `net.2` and `to_out.0` are numbers of a layer within one.
_BLOCKS = re.compile(r"(.*blocks?|layers?|layer\d|resnets|attentions|(down|up)samplers|h|temp_convs|.*refiner)$")
_WITHIN = frozenset({"in_layers", "out_layers", "emb_layers", "layer", "norm_layers"})
_STAGES = frozenset({"down_blocks", "up_blocks", "mid_block", "input_blocks", "middle_block", "output_blocks"})
_FIRST = (
    *("conv_in", "time", "add_emb", "label_emb", "class_emb", "x_emb", "context_emb", "patch", "embed", "img_in"),
    *("txt_in", "vector_in", "guidance", "caption", "pos_emb", "y_emb", "t_emb", "model.embed"),
)
_LAST = ("conv_norm_out", "conv_out", "out", "final", "norm_out", "proj_out", "lm_head")
_PARTS = ("resnets", "attentions", "motion", "temp")
_MIDDLE = ("mid", "up_", "output_blocks", "single")
_KINDS = ("q", "k", "v", "qkv", "o", "out", "proj", "gate", "up", "down", "in", "1", "2")


class Spot(NamedTuple):
    """Part of the pipeline ("" where the file tells none), block ("" outside of any), and the rest of the path, in
    which the numbers of blocks within the block are left out."""

    component: str
    block: str
    kind: str


def spot_of(path: str) -> Spot:
    """The spot of a layer."""
    rows = path.find("[")
    words = (path if rows < 0 else path[:rows]).split(".")
    component = component_of(words[0]) if len(words) > 1 else ""
    words = words[1:] if component else words
    if len(words) == 1 and (flat := re.match(r"(.+?_\d+)_(.+)", words[0])):
        return Spot(component, flat[1], flat[2])
    block, rest = _split(words)
    kept = [word for i, word in enumerate(rest) if not _is_numbered(rest, i) and not (i and _is_numbered(rest, i - 1))]
    return Spot(component, ".".join(block), ".".join(kept or rest))


def _is_numbered(words: list[str], at: int) -> bool:
    """Whether the word at that place is a container of blocks, with the number of one after it."""
    return (
        at + 2 < len(words) and bool(_BLOCKS.match(words[at])) and words[at] not in _WITHIN and words[at + 1].isdigit()
    )


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """The words of the block, and those after it."""
    for at in range(len(words)):
        if (
            words[at] == "layer"
            and at
            and at + 2 < len(words)
            and words[at + 1].isdigit()
            and words[at - 1] == "encoder"
        ):
            return words[: at + 2], words[at + 2 :]
        if words[at] in _STAGES or _is_numbered(words, at):
            end = at + 2 if words[at + 1 : at + 2] and words[at + 1].isdigit() else at + 1
            if words[at] in _STAGES:
                end += 1 if end + 1 < len(words) and words[end].isdigit() else 0
                end += 2 if _is_numbered(words, end) and words[end] != "transformer_blocks" else 0
            return words[:end], words[end:]
    return [], words


def _natural(text: str) -> tuple[tuple[int, int, int, str], ...]:
    """Numbers by their size, words by their letters; of the parts of one resolution, the resnet goes before the
    attention of the same number, and the sampler after all of them."""
    found = []
    words = re.split(r"[._]", text)
    for at, word in enumerate(words):
        number = int(words[at + 1]) if words[at + 1 : at + 2] and words[at + 1].isdigit() else 0
        if word in _PARTS:
            found.append((1, number, _PARTS.index(word), ""))
        elif word.endswith("samplers"):
            found.append((2, 0, 0, ""))
        else:
            found.append((0, int(word), 0, "") if word.isdigit() else (1, 0, 0, word))
    return tuple(found)


def _stage(block: str) -> int:
    """Before all blocks, among the first of them, in the middle, after them."""
    if block.startswith(_FIRST):
        return 0
    if block.startswith(_LAST) and not block.startswith("output_blocks"):
        return 5
    words = block.split(".")
    found = [i for i, start in enumerate(_MIDDLE) if any(word.startswith(start) for word in words)]
    return 1 if not found else 2 if found[0] == 0 or words[0] == "middle_block" else 3


def order_of(spot: Spot, path: str = "") -> tuple[object, ...]:
    """What to sort by for the order in which a model runs through its blocks, as far as names tell it."""
    place = _stage(spot.block or spot.kind)
    return spot.component, place, _natural(spot.block), _natural(path), _kind_order(spot.kind)


def _kind_order(kind: str) -> tuple[tuple[int, int, str], ...]:
    """Query, key, value, output of one attention beside each other, numbers by their size."""
    return tuple((0, int(word), "") if word.isdigit() else (1, _place(word), word) for word in kind.split("."))


def _place(word: str) -> int:
    bare = word.removeprefix("to_").removesuffix("_proj").removeprefix("w")
    return _KINDS.index(bare) if bare in _KINDS else len(_KINDS)


def kinds_in_order(kinds: Iterable[str]) -> list[str]:
    """Kinds of layers, those that belong together side by side."""
    return sorted(set(kinds), key=_kind_order)
