"""The file that an extraction writes: the names of its layers, what each costs there, and how large the whole is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch

from nerine.algorithms import Algorithm, DoRA, LoRA, Params
from nerine.files.checkpoint import Base, Layer
from nerine.files.dialects.base import Dialect
from nerine.files.header import place, render_header
from nerine.files.meta import write_meta
from nerine.files.store import Outgoing
from nerine.files.writing import lay_out
from nerine.site import Site
from nerine.tools.extract.prices import KEPT, Price, price_of
from nerine.tools.weights import Weights
from nerine.version import __version__

__all__ = ["Laid", "Sheet", "sketched"]


class Laid(NamedTuple):
    """What `nerine.files.folder.write` takes."""

    tensors: tuple[Outgoing, ...]
    metadata: Mapping[str, str]
    config: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        """The size of the file that it becomes, settings beside it included."""
        entries = place(((o.key, tuple(o.shape), o.dtype) for o in self.tensors), "")
        data = max((entry.end for entry in entries.values()), default=0)
        beside = json.dumps(self.config, indent=2, sort_keys=True, ensure_ascii=False) + "\n" if self.config else ""
        return len(render_header(entries, self.metadata, "")) + data + len(beside.encode())


def sketched(algorithm: Algorithm, site: Site, dtype: torch.dtype, base: Base | None = None) -> Layer:
    """A layer that has shapes and no values."""
    design = algorithm.design(site)
    shapes = design.shapes
    kept = {name: torch.float32 if name in KEPT else dtype for name in shapes}

    def load() -> Params:
        return Params({name: torch.empty(shape, dtype=kept[name], device="meta") for name, shape in shapes.items()})

    return Layer(algorithm, site, shapes, design.scale, load, base=base, dtypes=kept)


@dataclass(frozen=True)
class Sheet:
    """How layers of `base` are written: in `dialect` and `dtype`, with `metadata` beside what nerine says itself."""

    base: Weights
    dialect: Dialect
    dtype: torch.dtype
    component: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def sites(self) -> Mapping[str, Site]:
        return self.base.sites

    def lay_out(self, layers: Mapping[str, Layer]) -> Laid:
        """The file of these layers.

        Raises:
            FormatError: the dialect cannot hold one of them.
        """
        found = lay_out(layers, self.dialect, sites=self.sites, component=self.component)
        told = {path: layer.algorithm for path, layer in layers.items()}
        meta = write_meta(told, __version__, {**found.header, **self.metadata}, self.dialect.name)
        return Laid(found.tensors, meta, found.config)

    def stems(self, paths: Iterable[str]) -> dict[str, str]:
        """{layer: its name in the file}; without those that are there in pieces, or pieces of one."""
        layers = {path: sketched(LoRA(rank=1), self.sites[path], self.dtype) for path in paths}
        path_of = {id(layer): path for path, layer in layers.items()}
        found = lay_out(layers, self.dialect, sites=self.sites, component=self.component)
        return {path_of[id(layer)]: stem for stem, layer in found.layers.items() if id(layer) in path_of}

    def price(self, path: str, stem: str | None) -> Price:
        return price_of(stem or f"{self.dialect.name}_{path}", path, self.dtype)

    def refuses(self, algorithm: Algorithm, site: Site, is_alone: bool) -> bool:
        """Whether the dialect cannot hold an adapter there. Where a layer is in pieces in the file, or a piece of one,
        only plain products can be taken apart and put together whatever its neighbours have."""
        inner = algorithm.inner if isinstance(algorithm, DoRA) else algorithm
        if not is_alone and (inner is not algorithm or not isinstance(inner, LoRA)):
            return True
        return bool(self.dialect.refuses(sketched(algorithm, site, self.dtype).sketch()))
