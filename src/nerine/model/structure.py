"""Structure: what each weight of a model is for, read from the tree of its modules and from no list of classes.

Deep models repeat their blocks: entries of a ModuleList, or of a Sequential, that have several layers of their own.
Inside those, attention is known by its queries, keys and values, feed-forward layers by their shapes. What a name can
tell is written beside this file, in `words.toml`. This file knows nothing of presets and rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.resources import files

from torch import nn

from nerine.model.candidates import Candidate, candidates_of
from nerine.model.pipeline import unwrapped
from nerine.model.toml import parse

__all__ = ["ROLES", "WEIGHTS", "Structure"]

ROLES = ("block", "transformer", "convolution", "attention", "query", "key", "value", "feed_forward", "down")
_LISTS = (nn.ModuleList, nn.Sequential)
WEIGHTS = ("linear", "conv", "transposed")


@dataclass(eq=False)
class _Node:
    """A module, its name in the one above, and every weight at or below it."""

    name: str
    module: nn.Module
    above: _Node | None
    below: list[_Node] = field(default_factory=list)
    weights: list[Candidate] = field(default_factory=list)
    is_layer: bool = False

    @cached_property
    def is_list(self) -> bool:
        numbered = isinstance(self.module, nn.ModuleDict) and all(map(str.isdecimal, self.module))
        return numbered or isinstance(self.module, _LISTS)

    @cached_property
    def is_composite(self) -> bool:
        """Whether it is more than a layer or a row of layers."""
        if self.is_layer or not self.weights:
            return isinstance(self.module, nn.MultiheadAttention)
        return not self.is_list or any(child.is_composite for child in self.below)

    @cached_property
    def is_block(self) -> bool:
        """Whether it is one of the repeated blocks of a list."""
        if self.above is None or not self.above.is_list or not self.is_composite:
            return False
        rows = (child for child in self.above.below if child.is_composite)
        large = [child for child in rows if len(child.weights) > 1 or any(map(_is_spatial, child.weights))]
        if isinstance(self.above.module, nn.Sequential) and len(large) < 2:
            return any(node.is_block for node in self.lineage())  # a part of a block, but no row of blocks in itself
        return bool(large)

    def lineage(self) -> Iterator[_Node]:
        """What is above it, the nearest first."""
        node = self.above
        while node is not None:
            yield node
            node = node.above

    def walk(self) -> Iterator[_Node]:
        """It and everything below."""
        yield self
        for child in self.below:
            yield from child.walk()


class Structure:
    """The roles of every Linear and Conv of a model: `roles[path]` is a set of `ROLES`, empty outside of blocks.

    `block` inside a repeated block; `transformer` inside one that has attention, with what is around it, such as the
    projections in and out of a Transformer2DModel; `convolution` inside one that has convolutions and no attention;
    `attention` in an attention, where `query`, `key` and `value` are what gives those (a fused projection all of
    them); `feed_forward` in a group of layers that leads to another width and back, where `down` leads back.
    """

    def __init__(self, model: nn.Module) -> None:
        words = files("nerine.model").joinpath("words.toml").read_text(encoding="utf-8")
        self.words: Mapping[str, Mapping[str, Sequence[str]]] = parse(words, "words.toml")
        self.candidates = {c.path: c for c in candidates_of(model) if c.layer_kind in WEIGHTS}
        self.roles: dict[str, set[str]] = {path: set() for path in self.candidates}
        self.root = self._tree(model)
        self._attentions: dict[int, bool] = {}
        for block in self._outermost(self.root):
            self._mark(block.weights, "block")
            self._read(block)
        self.has_blocks = any("block" in roles for roles in self.roles.values())

    def _tree(self, model: nn.Module) -> _Node:
        weights: dict[int, list[Candidate]] = {}
        for candidate in self.candidates.values():
            weights.setdefault(id(candidate.module), []).append(candidate)
        seen: set[int] = set()

        def grow(name: str, module: nn.Module, above: _Node | None) -> _Node:
            seen.add(id(module))
            own = weights.get(id(module), [])
            node = _Node(name, module, above, weights=list(own), is_layer=bool(own))
            if not own:
                parts = [(n, None if m is None else unwrapped(m)) for n, m in module._modules.items()]
                fresh = [(n, m) for n, m in parts if m is not None and id(m) not in seen]
                node.below = [grow(n, m, node) for n, m in fresh if id(m) not in seen and n != "nerine"]
                node.weights = [c for child in node.below for c in child.weights]
            return node

        return grow("", unwrapped(model) or model, None)

    def _mark(self, weights: Sequence[Candidate], role: str) -> None:
        for candidate in weights:
            self.roles[candidate.path].add(role)

    # -- blocks --------------------------------------------------------------------------------------------------
    def _outermost(self, node: _Node) -> Iterator[_Node]:
        """The outermost repeated blocks, and what is of the class of one that has attention, such as a middle block."""
        if node is self.root:
            repeated = [n for n in node.walk() if n.is_block]
            self._classes = {type(n.module) for n in repeated if self._has_attention(n)} - set(_LISTS)
        if node.is_block or (node is not self.root and type(node.module) in self._classes):
            yield node
        else:
            for child in node.below:
                yield from self._outermost(child)

    def _read(self, block: _Node) -> None:
        """Tell blocks with attention from those of convolutions; a stage of both is read block by block."""
        if not self._has_attention(block):
            if any(c.layer_kind != "linear" for c in block.weights):
                self._mark(block.weights, "convolution")
            return
        inner = [node for child in block.below for node in self._inner(child)]
        if any(not self._has_attention(node) and any(map(_is_spatial, node.weights)) for node in inner):
            self._read_stage(block)
            return
        self._mark(block.weights, "transformer")
        self._read_attention(block)
        self._read_feed_forward(block)

    def _read_stage(self, stage: _Node) -> None:
        """Read the parts of a stage one by one, those that are in no list of blocks too."""
        for child in stage.below:
            if child.is_block or not any(True for _ in self._inner(child)):
                self._read(child)
            else:
                self._read_stage(child)

    def _inner(self, node: _Node) -> Iterator[_Node]:
        """The outermost repeated blocks at or below a part of a block."""
        if node.is_block:
            yield node
        else:
            for child in node.below:
                yield from self._inner(child)

    # -- attention -----------------------------------------------------------------------------------------------
    def _has_attention(self, node: _Node) -> bool:
        if id(node) not in self._attentions:
            self._attentions[id(node)] = any(self._is_attention(n) or self._is_hint(n) for n in node.walk())
        return self._attentions[id(node)]

    def _is_attention(self, node: _Node) -> bool:
        """Whether queries, keys and values are made right below."""
        if isinstance(node.module, nn.MultiheadAttention):
            return True
        if node.is_layer or node.is_list or self._says(node.name, "feed_forward", "modules"):
            return False
        names = [child.name for child in node.below if child.is_layer or (child.is_list and not child.is_composite)]
        return all(any(self._says(n, "attention", part) for n in names) for part in ("query", "key", "value"))

    def _is_hint(self, node: _Node) -> bool:
        """Whether it shows an attention whose layers do not: it normalises queries, or has parameters for them."""
        parts = [child.name for child in node.below if not child.weights]
        if any("norm" in name.lower() and self._says(name, "attention", "normalised") for name in parts):
            return True
        own = [n for n, p in node.module._parameters.items() if p is not None and p.dim() > 1 and not node.is_layer]
        return all(any(self._says(n, "attention", part) for n in own) for part in ("query", "key", "value"))

    def _read_attention(self, block: _Node) -> None:
        for node in block.walk():
            if not self._is_attention(node):
                continue
            whole = node
            for above in node.lineage():
                if (
                    above is block
                    or above.is_list
                    or above.is_block
                    or not self._says(above.name, "attention", "around")
                ):
                    break
                whole = above
            is_part = node is block or node.is_block
            lone = is_part and any(not self._in_attention(n.name) for n in node.below if n.weights)
            for candidate, names in _below(whole):
                if not lone or self._in_attention(names[0]):
                    self._mark([candidate], "attention")
                    for part in ("query", "key", "value"):
                        if names[-1] == "in_proj_weight" or any(self._says(n, "attention", part) for n in names):
                            self._mark([candidate], part)

    def _in_attention(self, name: str) -> bool:
        """Whether a layer beside others in a block belongs to the attention."""
        return any(self._says(name, "attention", part) for part in ("query", "key", "value", "output"))

    # -- feed-forward --------------------------------------------------------------------------------------------
    def _read_feed_forward(self, region: _Node) -> None:
        for block in region.walk():
            if block is not region and not block.is_block:
                continue
            inner = [node for child in block.below for node in self._inner(child)]
            if any(self._has_attention(node) for node in inner):
                continue  # what is around inner blocks leads in and out of them
            apart = {c.path for node in inner for c in node.weights}
            for group in self._groups(block, apart):
                down = self._down(group)
                self._mark(group if down else [], "feed_forward")
                self._mark(down, "down")

    def _groups(self, block: _Node, apart: set[str]) -> list[list[Candidate]]:
        """The layers of a block that may be feed-forward, those together that have the same module around them."""
        found: dict[int, list[Candidate]] = {}
        count: Counter[int] = Counter()
        chains: list[tuple[Candidate, list[_Node]]] = []
        for node in block.walk():
            for candidate in node.weights if node.is_layer else ():
                chain = [above for above in node.lineage() if above is block or block in above.lineage()]
                names = [node.name, *(above.name for above in chain if above is not block)]
                others = any(self._says(name, "feed_forward", "others") for name in names)
                attention = "attention" in self.roles[candidate.path]
                if candidate.path not in apart and not others and not attention and _is_linear(candidate):
                    chains.append((candidate, chain))
                    count.update(id(above) for above in chain)
        for candidate, chain in chains:
            around = next((above for above in chain if count[id(above)] > 1), None)
            if around is not None:
                found.setdefault(id(around), []).append(candidate)
        return list(found.values())

    def _down(self, group: list[Candidate]) -> list[Candidate]:
        """The layers that lead back: of another shape than the rest, or else the last that is as wide as the input."""
        if len(group) < 2:
            return []
        shapes = [_ends(c) for c in group]
        counts = Counter(shapes)
        if len(group) > 2 and len(counts) == 2 and 1 in counts.values():
            odd = next(shape for shape, count in counts.items() if count == 1)
            if odd == tuple(reversed(next(shape for shape in shapes if shape != odd))):
                return [group[shapes.index(odd)]]
        named = [c for c in group if self._says(c.path.split(".")[-1], "feed_forward", "down")]
        if named and len(group) > 2:
            return named
        back = [c for c, (_, out) in zip(group[1:], shapes[1:], strict=True) if out == shapes[0][0]]
        return back[-1:]

    # -- names ---------------------------------------------------------------------------------------------------
    def _says(self, name: str, chapter: str, part: str) -> bool:
        return any(fnmatchcase(word, want) for want in self.words[chapter][part] for word in _words(name))

    def is_text_encoder(self) -> bool:
        """Whether it reads tokens and has no time step: an embedding and nothing of a denoiser beside its blocks."""
        tokens = False
        for node in self._outside(self.root):
            if self._says(node.name, "text_encoder", "foreign"):
                return False
            tokens = tokens or isinstance(node.module, nn.Embedding)
        return tokens

    def _outside(self, node: _Node) -> Iterator[_Node]:
        if node.is_block or node.is_layer:
            if node.is_layer:
                yield node
            return
        yield node
        for child in node.below:
            yield from self._outside(child)


def _words(name: str) -> list[str]:
    whole = name.lower()
    pieces = whole.split("_")
    return [whole, *pieces, *(piece.rstrip("0123456789") for piece in pieces if piece[-1:].isdigit())]


def _below(node: _Node) -> Iterator[tuple[Candidate, list[str]]]:
    """Every weight at or below a module, with the names that lead to it, the last that of its layer."""
    if isinstance(node.module, nn.MultiheadAttention):
        for candidate in node.weights:
            yield candidate, [candidate.path.split(".")[-1]]
        return
    for child in node.below:
        if child.is_layer and not isinstance(child.module, nn.MultiheadAttention):
            yield child.weights[0], [child.name]
        else:
            for candidate, names in _below(child):
                yield candidate, [child.name, *names]


def _is_spatial(candidate: Candidate) -> bool:
    return any(k > 1 for k in getattr(candidate.holder, "kernel_size", ()))


def _is_linear(candidate: Candidate) -> bool:
    return not _is_spatial(candidate) and getattr(candidate.holder, "groups", 1) == 1


def _ends(candidate: Candidate) -> tuple[int, int]:
    """How wide the input and the output of a layer are."""
    holder = candidate.holder
    for into, out in (("in_features", "out_features"), ("in_channels", "out_channels"), ("nx", "nf")):
        if hasattr(holder, into):
            return getattr(holder, into), getattr(holder, out)
    shape = holder._parameters[candidate.attr].shape  # type: ignore[union-attr]
    return shape[-1], shape[-2]
