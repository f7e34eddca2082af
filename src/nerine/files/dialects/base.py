"""What a dialect is: the names that one program gives to layers and tensors, and what it means by the numbers.

Reading goes from the file's keys to pieces in the canonical spelling (`Dialect.parts`), writing from a record to
tensors by suffix (`Dialect.emit`). Neither knows the model: `reading` finds the layers, `writing` names them.
"""

from __future__ import annotations

import functools
from abc import ABC
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from nerine.algorithms import Params
from nerine.axes import Layout
from nerine.files.checkpoint import Base, Layer, Record
from nerine.files.pieces import ALPHA, MAGNITUDE, Known, Parts, Piece, Stem, is_zero, piece_of, split
from nerine.files.store import Source
from nerine.ops.precision import wide
from nerine.site import Site

__all__ = [
    "DENOISER",
    "EMBEDDINGS",
    "EXACT",
    "Dialect",
    "Emitted",
    "Shapes",
    "Splits",
    "canonical",
    "is_unet",
    "rank_of",
]

Emitted = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]  # of the weights of a model, by path
Splits = Mapping[str, tuple[str, str] | None]  # key: what stands before its suffix, and the suffix
DENOISER = "denoiser"  # the UNet or transformer of a pipeline, whatever a program calls it
EMBEDDINGS = "bundle_emb."


class Dialect(ABC):
    """How one program writes adapters. *May* be overridden: whatever is not exactly so in its files."""

    name: ClassVar[str]
    about: ClassVar[str]  # who writes it, in a few words
    prefixes: ClassVar[Mapping[str, str]]  # what stands before a layer's name: the component that it says
    flat: ClassVar[bool]  # names have underscores for dots
    naming: ClassVar[str] = "own"  # whose names of layers it writes: the model's own, "native" or "diffusers"
    folder: ClassVar[bool] = False  # it is a folder with a config beside the tensors
    detected: ClassVar[bool] = True  # a dialect of its own, and not only a way to write another
    variant: ClassVar[bool] = False  # it is told from another dialect by what only this program writes, or not at all
    rows: ClassVar[bool] = False  # an adapter on some rows of a layer has a name of its own, as in "to_qkv[0:64]"
    renamed: ClassVar[Mapping[str, str]] = {}  # suffixes that mean something else here than elsewhere

    # -- detection -----------------------------------------------------------------------------------------------
    def score(self, source: Source, splits: Splits, known: Known) -> float:
        """How much of a file this dialect explains, 0 to 1; a little more where something tells of it alone. `splits`
        are the keys taken apart, which a dialect with suffixes of its own does again."""
        if not source.keys or not self.detected or (self.variant and not self.telling(source)):
            return 0.0
        if self.renamed:
            suffixes = {**known.suffixes, **self.renamed}
            splits = {key: split(key, suffixes) for key in splits}
        stems = {parts[0] for parts in splits.values() if parts is not None}
        own = {stem for stem in stems if self.stem(stem) is not None}
        explained = sum(parts is not None and parts[0] in own and self.spells(parts[1]) for parts in splits.values())
        share = explained / len(source.keys)
        return share + (0.01 if share and self.telling(source) else 0.0)

    def telling(self, source: Source) -> bool:
        """Whether the file has something that only this program writes."""
        return False

    def spells(self, suffix: str) -> bool:
        """Whether this program writes a tensor under that suffix."""
        return True

    @functools.cached_property
    def _longest_first(self) -> list[str]:
        return sorted(self.prefixes, key=len, reverse=True)

    # -- reading -------------------------------------------------------------------------------------------------
    def stem(self, text: str) -> Stem | None:
        """What stands before the suffix, taken apart; None where it is no name of this dialect."""
        if self.flat and "." in text:
            return None
        for prefix in self._longest_first:
            if text.startswith(prefix) and len(text) > len(prefix):
                return Stem(text, self.prefixes[prefix], text[len(prefix) :], self.flat)
        return None

    def parts(self, source: Source, known: Known) -> Parts:
        """The keys of a file as pieces of layers.

        Raises:
            FormatError: two keys mean the same tensor.
        """
        suffixes = {**known.suffixes, **self.renamed}
        found = Parts()
        stems: dict[str, Stem | None] = {}
        for key in source.keys:
            parts = split(key, suffixes)
            if parts is not None and parts[0] not in stems:
                stems[parts[0]] = self.stem(parts[0])
            stem = None if parts is None else stems[parts[0]]
            if key.startswith(EMBEDDINGS) and key.count(".") >= 2:
                _, trigger, name = key.split(".", 2)
                found.embeddings.setdefault(trigger, {})[name] = piece_of(source, key)
            elif parts is None:
                found.unused[key] = "no known algorithm has such a tensor"
            elif stem is None:
                found.unused[key] = f"not a name in the {self.name} dialect"
            else:
                found.add(stem, suffixes[parts[1]], piece_of(source, key), source.path)
        for stem, pieces in found.layers.items():
            found.layers[stem] = self.translate(stem, _unscaled(pieces), source)
        return found

    def translate(self, stem: Stem, pieces: dict[str, Piece], source: Source) -> dict[str, Piece]:
        """The pieces of one layer in the canonical spelling and meaning."""
        return pieces

    def settle(self, layer: Layer, stem: Stem, source: Source) -> Layer:
        """The layer that was recognised, with what this dialect knows of it beyond its tensors."""
        return layer

    # -- writing -------------------------------------------------------------------------------------------------
    def key(self, stem: str, suffix: str) -> str:
        """The key of a tensor."""
        return f"{stem}.{suffix}"

    def prefix_of(self, component: str, part: str, shapes: Shapes, several: bool) -> str:
        """What stands before the name of a layer of `component`, which hosts call `part` where they say so. `shapes`
        are those of all its layers, by path; `several` says that its pipeline has more text encoders than one."""
        wanted = [prefix for prefix, known in self.prefixes.items() if known == component]
        return wanted[0] if wanted else next(iter(self.prefixes))

    def stem_text(self, path: str) -> str:
        """What a layer of that path would be called in a file, roughly, for errors."""
        prefix = next(iter(self.prefixes))
        return prefix + (path.replace(".", "_") if self.flat else path)

    def naming_for(self, family: str) -> str:
        """Whose names of layers it writes for a family of models: "native", "diffusers", or the model's "own"."""
        return self.naming

    def beside(self, records: Mapping[str, Record]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        """The settings of a file in a file of their own, and those in its header; `records` (by the name before the
        suffix) have shapes alone.

        Raises:
            FormatError: no settings describe all of them.
        """
        return {}, {}

    def refuses(self, record: Record) -> str:
        """Why this dialect cannot hold an adapter exactly; empty where it can. Shapes alone decide."""
        return ""

    def emit(self, record: Record, base: Base | None) -> Emitted:
        """The tensors of a layer by suffix, in the number format in which they are kept.

        Raises:
            FormatError: the weight of the layer is needed, and not at hand.
        """
        return canonical(record)


def is_unet(shapes: Shapes) -> bool:
    """Whether a denoiser is a UNet, by its layers."""
    return any(path.startswith(("down_blocks.", "input_blocks.")) for path in shapes)


def _unscaled(pieces: dict[str, Piece]) -> dict[str, Piece]:
    """OFT of OneTrainer's without the mark that its entries, as stored, are 2·√(s - 1) times too large."""
    mark, upper = pieces.pop("scaled_oft", None), pieces.get("oft_R.weight")
    if mark is None or upper is None or len(upper.shape) != 2 or is_zero(mark):
        return pieces
    size = round((1 + (1 + 8 * upper.shape[1]) ** 0.5) / 2)
    factor = 1 / (2 * max(size - 1, 1) ** 0.5)
    return {**pieces, "oft_R.weight": upper.changed(lambda t: wide(t) * factor)}


def canonical(record: Record) -> Emitted:
    """The tensors of a layer as LyCORIS spells them, alpha included."""
    algorithm, site, params = record.algorithm, record.site, record.params
    layout = algorithm.layout_of(params.tensors)
    tensors = {spec.key: params.tensors[name] for name, spec in layout.specs.items()}
    for key, value in layout.marks.items():
        tensors[key] = torch.tensor(int(value))
    if layout.alpha:
        alpha = params.scale * (rank_of(params, layout, site) if layout.alpha == "scale" else 1)
        tensors[ALPHA] = torch.tensor(alpha, dtype=torch.float32)
    return tensors


def rank_of(params: Params, layout: Layout, site: Site) -> int:
    """The rank by which readers divide alpha; one where no tensor has a rank."""
    for name, spec in layout.specs.items():
        if "rank" in spec.words:
            shape = params.tensors[name].shape
            return int(shape[1:][spec.words.index("rank")] if site.experts else shape[spec.words.index("rank")])
    return 1


EXACT = frozenset({ALPHA, MAGNITUDE})  # kept in fp32 whatever the tensors are cast to
