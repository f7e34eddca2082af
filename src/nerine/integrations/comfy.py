"""Adapters as patches of ComfyUI's: one for each weight, which computes W' when ComfyUI asks for that weight.

ComfyUI keeps a model as it was loaded and beside it a list of patches for each weight, which it applies whenever that
weight goes to where it is needed, and takes back. What is made here is such a patch for any adapter that nerine reads.
It holds the tensors of the adapter alone; nothing dense exists before ComfyUI patches a weight.

Nothing here imports ComfyUI: a model is its module, and the node in `integrations/comfyui/` hands over the rest.
Source: ComfyUI `comfy/lora.py`, `comfy/model_patcher.py`, `comfy/weight_adapter/base.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nerine.algorithms import Algorithm, DoRA, Params
from nerine.errors import FormatError, ShapeError, UnsupportedBase
from nerine.files.checkpoint import Checkpoint, Layer
from nerine.files.folder import open_adapter
from nerine.files.reading import read_checkpoint
from nerine.files.reports import LoadReport
from nerine.files.writing import split_rows
from nerine.integrations.comfy_blocks import Block, read_blocks, refuse_idle, strength_of
from nerine.integrations.comfy_layers import Slot, rows_of, slots_of
from nerine.model.adapter import weight_deviation
from nerine.ops.precision import full_precision, is_finite, wide
from nerine.site import Site

__all__ = ["Part", "Patch", "Patches", "adapter_patches", "describe", "originals_of", "patched"]

Originals = Callable[[str], Tensor]
"""The weight that a model was loaded with, by its key in the state dict."""


@dataclass(frozen=True)
class Part:
    """All of an adapter but its tensors. `ready` says that those have been completed already, beside the weight."""

    algorithm: Algorithm
    site: Site
    names: tuple[str, ...]
    scale: float
    strength: float
    rows: tuple[int, int] | None = None
    ready: bool = False

    def deviation(self, tensors: Sequence[Tensor], weight: Tensor) -> Tensor:
        """W' - W for a weight `[out, in/groups, *k]` (or several experts) in at least fp32, at strength one."""
        values = [t.to(weight.device, torch.promote_types(weight.dtype, t.dtype)) for t in tensors]
        p = Params(dict(zip(self.names, values, strict=True)), self.scale)
        p = p if self.ready else self.algorithm.from_file(p)
        return weight_deviation(self.algorithm, self.site, p, weight)


class Patch:
    """What ComfyUI calls for a weight: the adapters on it, each as a `Part` with its tensors.

    W' = W + Σ strength·(T(W) - W), where every T sees the weight that comes in. ComfyUI makes such an object anew from
    `loaded_keys` and `weights`, with the tensors elsewhere, so there must be nothing else in it.
    """

    name = "nerine"

    def __init__(self, loaded_keys: set[str], weights: Sequence[tuple[Part, Sequence[Tensor]]]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights

    def at(self, strength: float) -> Patch:
        """This patch at a strength."""
        return self._of([(replace(part, strength=part.strength * strength), ts) for part, ts in self.weights])

    def beside(self, other: Patch) -> Patch:
        """Both patches in one, so that neither sees what the other has done."""
        return type(self)(self.loaded_keys | other.loaded_keys, [*self.weights, *other.weights])

    def _of(self, weights: Sequence[tuple[Part, Sequence[Tensor]]]) -> Patch:
        return type(self)(self.loaded_keys, weights)

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Callable[[Tensor], Tensor] | None,
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:
        """The patched weight, in the memory of `weight`, which ComfyUI has copied.

        Raises:
            ShapeError: the weight is not of the shape that it had when the adapter was loaded.
        """
        if not strength:
            return weight
        with torch.no_grad(), full_precision(weight):
            start = wide(weight)
            total: Tensor | None = None
            for part, tensors in self.weights:
                if part.strength:
                    change = _change(part, tensors, start, key) * (part.strength * strength)
                    total = change if total is None else total.add_(change)
            if total is None:
                return weight
            return weight.copy_(start + (total if function is None else function(total)))


def _change(part: Part, tensors: Sequence[Tensor], weight: Tensor, key: str) -> Tensor:
    """What a part does to a weight at strength one, both in the module's own form."""
    own = part.site.canonical(weight)
    own = own if part.rows is None else own[part.rows[0] : part.rows[1]]
    expected = (part.site.experts, *part.site.shape) if part.site.experts else part.site.shape
    if tuple(own.shape) != expected:
        raise ShapeError(
            f"{key}: the adapter was loaded for a weight of {expected}, and now it is {tuple(own.shape)}; another node "
            "has changed the layer, so put the adapter after that node"
        )
    change = part.site.native(part.deviation(tensors, own))
    if part.rows is None:
        return change
    whole = torch.zeros_like(weight)
    whole[part.rows[0] : part.rows[1]] = change
    return whole


class Patches(NamedTuple):
    """The patches of a model and of its text encoders by key of the state dict, and the report of reading the file."""

    model: dict[str, Any]
    clip: dict[str, Any]
    report: LoadReport


def adapter_patches(
    file: str | os.PathLike[str],
    model: nn.Module | None = None,
    clip: nn.Module | None = None,
    *,
    blocks: str = "",
    originals: Mapping[str, Originals] | None = None,
    dialect: str | None = None,
    component: str | None = None,
    allow_pickle: bool = False,
    kind: type[Patch] = Patch,
) -> Patches:
    """The adapters of a file as patches for ComfyUI's `model` (with `diffusion_model`) and `clip` (with text encoders).

    `blocks` are strengths of parts of the model, as in "double_blocks.0-9=0.5, single_blocks=0.8". `originals` gives
    for "model" and "clip" the weights as they were loaded; they are asked for by the few adapters that are completed
    from them, and are those of the modules where it is not given. `kind` is the class of the patches. The file is read
    as by `nerine.load`.

    Raises:
        FormatError: damaged, nothing matched, or in no one dialect.
        ShapeError: a tensor does not fit its layer.
        OptionError: `blocks` cannot be read.
        TargetError: a name in `blocks` matches nothing in the model.
    """
    slots = slots_of(model, clip)
    wanted = read_blocks(blocks)
    refuse_idle(wanted, [slot.shown for slot in slots.values()])
    given = originals or {w: _state_of(m) for w, m in (("model", model), ("clip", clip)) if m is not None}
    found = Patches({}, {}, LoadReport(os.fspath(file)))
    with open_adapter(file, allow_pickle=allow_pickle) as source:
        sites = {**{path: slot.site for path, slot in slots.items()}, **rows_of(slots, source.keys)}
        checkpoint = read_checkpoint(source, sites, dialect=dialect, component=component)
        keys: dict[str, list[str]] = {}
        for name, used_for in checkpoint.report.used.items():
            keys.setdefault(used_for, []).append(name)
        notes = []
        for path, layer in checkpoint.layers.items():
            whole, rows = split_rows(path)
            slot = slots[whole]
            strength = strength_of(wanted, slot.shown)
            part, tensors, note = _part(layer, path, slot, given.get(slot.where), strength, rows)
            notes += [f"{path}: {note}"] if note else []
            target = found.model if slot.where == "model" else found.clip
            notes += _put(target, slot, kind(set(keys.get(path, ())), [(part, tensors)]))
    report = replace(checkpoint.report, notes=(*checkpoint.report.notes, *notes, *_counts(wanted, checkpoint, slots)))
    return found._replace(report=report)


def _state_of(module: nn.Module) -> Originals:
    state = module.state_dict()
    return lambda key: state[key]


def _part(
    layer: Layer, path: str, slot: Slot, original: Originals | None, strength: float, rows: tuple[int, int] | None
) -> tuple[Part, tuple[Tensor, ...], str]:
    """An adapter brought into memory, and a note on what was completed, or on numbers that are none."""
    record = layer.record()
    notes = [f"not finite: {name}" for name, t in record.params.tensors.items() if not is_finite(t)]
    needs_weight = layer.finish is not None or _completes(record.algorithm)
    if needs_weight:
        weight = _original(original, slot, path)
        weight = record.site.canonical(weight) if rows is None else weight[rows[0] : rows[1]]
        params = record.params.filled(wide(t).to(weight.device) for t in record.params.tensors.values())
        record = replace(record, params=params)
        with torch.no_grad():
            record = record if layer.finish is None else layer.finish(record, weight, None)
            params = record.algorithm.from_file(record.params)
            params, note = record.algorithm.complete(params, weight)
        notes += [note] if note else []
        record = replace(record, params=params.filled(t.cpu() for t in params.tensors.values()))
    names = tuple(record.params.tensors)
    part = Part(record.algorithm, record.site, names, record.params.scale, strength, rows, needs_weight)
    return part, tuple(record.params.tensors.values()), "; ".join(notes)


def _completes(algorithm: Algorithm) -> bool:
    """Whether tensors of other programs may lack something that the weight tells."""
    inner = algorithm.inner if isinstance(algorithm, DoRA) else algorithm
    return type(inner).complete is not Algorithm.complete


def _original(original: Originals | None, slot: Slot, path: str) -> Tensor:
    weight = None if original is None else original(slot.key)
    expected = slot.site.native(torch.empty(slot.site.shape, device="meta")).shape
    if weight is None or weight.is_meta or not weight.is_floating_point() or weight.shape != expected:
        form = "none" if weight is None else f"one of {weight.dtype} and {tuple(weight.shape)}"
        raise UnsupportedBase(
            f"{path}: its adapter is completed from the weight {slot.key}, of which {form} was found; expected "
            f"ordinary numbers of {tuple(expected)}. Load the model unquantised, or convert the file with nerine first"
        )
    return wide(weight.detach())


def _put(target: dict[str, Any], slot: Slot, patch: Patch) -> list[str]:
    """Put the patch of a weight, and that of its bias, where they belong; notes on what cannot be put anywhere."""
    held = target.get(slot.key)
    target[slot.key] = patch if held is None else held.beside(patch)  # adapters on several rows of one weight
    notes = []
    for part, tensors in patch.weights:
        shift = part.algorithm.shift(Params(dict(zip(part.names, map(wide, tensors), strict=True)), part.scale))
        if shift is None or not part.strength:
            continue
        if not slot.site.has_bias:
            notes.append(f"{slot.key}: the adapter moves a bias, and this layer has none; only its weight is patched")
            continue
        shift = shift.detach() * part.strength
        if part.rows is not None:
            whole = shift.new_zeros(slot.site.shape[0])
            whole[part.rows[0] : part.rows[1]] = shift
            shift = whole
        earlier = target.get(slot.bias)
        target[slot.bias] = ("diff", (shift if earlier is None else earlier[1][0] + shift,))
    return notes


def _counts(wanted: Sequence[Block], checkpoint: Checkpoint, slots: Mapping[str, Slot]) -> Iterator[str]:
    """How many layers each strength is for."""
    found: dict[str, int] = {}
    for path in checkpoint.layers:
        block = next((b for b in wanted if b.matches(slots[split_rows(path)[0]].shown)), None)
        if block is not None:
            found[block.text] = found.get(block.text, 0) + 1
    for block in wanted:
        yield f"strength {block.text}: {found.get(block.text, 0)} layers"


def patched(patcher: Any, patches: Mapping[str, Any], strength: float) -> Any:
    """A clone of a model patcher with these patches, beside those that it has.

    Adapters of nerine that follow each other directly act beside each other, as `nerine.load` has them; any other patch
    sees, as ComfyUI has it, the weight that the patches before it leave.
    """
    clone = patcher.clone()
    if not strength:
        return clone
    joined: dict[str, Patch] = {}
    for key, patch in patches.items():
        entries = clone.patches.get(key, [])
        if not isinstance(patch, Patch) or not entries:
            continue
        before, held, *rest = entries[-1]
        if isinstance(held, Patch) and tuple(rest) == (1.0, None, None):
            clone.patches[key] = entries[:-1]
            joined[key] = held.at(before).beside(patch.at(strength))
    others = {key: patch for key, patch in patches.items() if key not in joined}
    if joined:
        clone.add_patches(joined, 1.0)
    if others:
        clone.add_patches(others, strength)
    return clone


def originals_of(patcher: Any) -> Originals:
    """The weights of a model patcher as they were loaded, whatever is patched at the moment."""

    def original(key: str) -> Tensor:
        found = patcher.get_key_patches(key)
        if key not in found:
            raise FormatError(f"{key}: the model has no such weight any more")
        weight, convert = found[key][0]
        return convert(wide(weight).clone(), inplace=True)  # type: ignore[no-any-return]

    return original


def describe(file: str | os.PathLike[str], *, allow_pickle: bool = False) -> str:
    """What is in a file, without a model: its dialect, and the algorithm, rank and scale of every layer."""
    with open_adapter(file, allow_pickle=allow_pickle) as source:
        return str(read_checkpoint(source).report)
