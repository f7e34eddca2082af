"""What attaching would do on a checkpoint whose program is not installed, and what presets choose there.

The model is a skeleton, made of the names and shapes of the file alone; no weight is read.
"""

from __future__ import annotations

import math
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from nerine.algorithms import REGISTRY, Algorithm, DoRA, LoRA
from nerine.errors import OptionError, TargetError, nearest, shown
from nerine.model.pipeline import Parts
from nerine.model.plan import Plan, PlanRow, plan
from nerine.model.presets import PRESETS, Preset, choose, is_preset, preset_of, why_nothing
from nerine.model.rules import Rule
from nerine.model.rules_file import read_rules
from nerine.model.structure import Structure
from nerine.tables import table
from nerine.tools.inspect.places import order_of, spot_of
from nerine.tools.weights import Weights, open_weights

__all__ = [
    "PRESETS",
    "CheckpointPlan",
    "PresetRow",
    "PresetsReport",
    "algorithm_of",
    "plan_checkpoint",
    "preset_text",
    "presets_report",
]

PathLike = str | os.PathLike[str]
HALF, FULL = 2, 4  # bytes of a value in the file (fp16) and in training (fp32)
ADAM = 8  # bytes of a value's two moments in AdamW
_TRUE, _FALSE, _NOTHING = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), ("none", "null", "")


# -- settings ----------------------------------------------------------------------------------------------------------
def algorithm_of(name: str, settings: Mapping[str, str], dora: bool = False) -> Algorithm:
    """The algorithm of that name; `settings` are texts, read by the types of its settings. "dora" is DoRA around LoRA.

    Raises:
        OptionError: there is no such algorithm or setting, or a text that is not of its type.
    """
    if name == DoRA.name:
        name, dora = LoRA.name, True
    if name not in REGISTRY:
        raise OptionError(f"--algo: no algorithm is called {name!r}. {nearest(name, [*REGISTRY, DoRA.name])}")
    kind = REGISTRY[name]
    own, outer = _types(kind), {key: t for key, t in _types(DoRA).items() if key != "inner"} if dora else {}
    for key in settings:
        if key not in {**own, **outer}:
            raise OptionError(f"{kind.__name__} has no setting {key!r}. {nearest(key, {**own, **outer})}")
    inner = kind(**{key: _read(key, text, own[key]) for key, text in settings.items() if key in own})
    around = {key: _read(key, text, outer[key]) for key, text in settings.items() if key not in own}
    return DoRA(inner, **around) if dora else inner


def _types(kind: type[Algorithm]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {name: hints[name] for name in kind.__dataclass_fields__}


def _read(key: str, text: str, kind: Any) -> Any:
    """A setting of its type from a text."""
    kinds = typing.get_args(kind) or (kind,)
    word = text.strip().lower()
    if type(None) in kinds and word in _NOTHING:
        return None
    if bool in kinds and word in (*_TRUE, *_FALSE):
        return word in _TRUE
    if str in kinds:
        return text
    for number in (int, float):
        if number in kinds:
            try:
                return number(text)
            except ValueError:
                continue
    names = {bool: "true or false", int: "a whole number", float: "a number", type(None): "none"}
    raise OptionError(f"{key}: expected {' or '.join(names[k] for k in kinds if k in names)}, got {text!r}")


# -- plans -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class CheckpointPlan:
    """What attaching would do on a checkpoint. `str()` has a line for every block, `by_layer()` one for every layer."""

    base: str
    plan: Plan
    notes: tuple[str, ...] = ()

    @property
    def params(self) -> int:
        """Trained values."""
        return self.plan.params

    @property
    def file_bytes(self) -> int:
        """Bytes of the tensors in a file of fp16; magnitudes stay in fp32."""
        sizes = ((name, math.prod(shape)) for row in self.plan.rows for name, shape in row.tensors.items())
        return sum(count * (FULL if name == "magnitude" else HALF) for name, count in sizes)

    @property
    def training_bytes(self) -> dict[str, int]:
        """Bytes in training with AdamW, all in fp32: the values, their gradients, and the two moments of each."""
        return {"values": FULL * self.params, "gradients": FULL * self.params, "optimizer": ADAM * self.params}

    @property
    def share(self) -> float:
        """Trained values over those of the base."""
        return self.params / self.plan.base_params if self.plan.base_params else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "base": self.base,
            **self.plan.to_dict(),
            "share": self.share,
            "file_bytes": self.file_bytes,
            "training_bytes": {**self.training_bytes, "all": sum(self.training_bytes.values())},
            "notes": list(self.notes),
        }

    def by_layer(self) -> str:
        """A table of all layers."""
        rows = [
            (row.layer, row.kind, "x".join(map(str, row.shape)), row.algorithm, f"{row.params:,}", row.path, row.note)
            for row in self.plan.rows
        ]
        return table(("layer", "kind", "shape", "algorithm", "values", "computes", "note"), rows)

    def __str__(self) -> str:
        rows = [
            (block.name, block.layers, ", ".join(block.kinds), " | ".join(block.algorithms), f"{block.params:,}")
            for block in _blocks(self.plan.rows)
        ]
        lines = [table(("block", "layers", "kinds", "algorithm", "values"), rows), "", *self._sums()]
        return "\n".join([*lines, *_left_out(self.plan.skipped), *(f"note: {note}" for note in self.notes)])

    def _sums(self) -> list[str]:
        training = self.training_bytes
        ways: dict[str, int] = {}
        for row in self.plan.rows:
            ways[row.path] = ways.get(row.path, 0) + 1
        told = {
            "factored": "beside the layer",
            "weight": "with the changed weight",
            "input": "on a changed input",
            "module": "through their own forward",
        }
        return [
            f"{len(self.plan.rows)} layers, {self.params:,} trained values, {self.share:.2%} of {self.base} "
            f"({self.plan.base_params:,})",
            f"file      {_size(self.file_bytes)} in fp16",
            f"training  {_size(sum(training.values()))}: values {_size(training['values'])}, gradients "
            f"{_size(training['gradients'])}, AdamW {_size(training['optimizer'])} (fp32; activations come on top)",
            "computes  " + ", ".join(f"{count} {told[way]}" for way, count in ways.items()),
        ]


@dataclass
class _Block:
    """Layers of one block, or of several that are alike and follow each other."""

    name: str
    layers: int
    kinds: tuple[str, ...]
    algorithms: tuple[str, ...]
    params: int


def _blocks(rows: Sequence[PlanRow]) -> list[_Block]:
    """The blocks in the order in which models run through them; those that follow each other and are alike in one."""
    found: dict[tuple[str, str], list[PlanRow]] = {}
    ordered = sorted(rows, key=lambda row: order_of(spot_of(row.layer), row.layer))
    for row in ordered:
        spot = spot_of(row.layer)
        part = row.layer.partition(".")[0] if spot.component else ""
        found.setdefault((part, spot.block or row.layer.removeprefix(f"{part}.")), []).append(row)
    blocks: list[_Block] = []
    runs: list[tuple[str, int, int, tuple[Any, ...]]] = []  # what stands before the number, first, last, and what is in
    for (part, name), own in found.items():
        kinds = tuple(sorted({row.kind for row in own}))
        params = sum(row.params for row in own)
        made = (part, len(own), kinds, tuple(dict.fromkeys(row.algorithm for row in own)), params)
        lead, _, number = name.rpartition(".")
        last = runs[-1] if runs else None
        if last and number.isdecimal() and last[0] == lead and last[2] + 1 == int(number) and last[3] == made:
            runs[-1] = (lead, last[1], int(number), made)
        else:
            runs.append((lead, int(number), int(number), made) if number.isdecimal() else (name, -1, -1, made))
    for lead, first, end, (part, count, kinds, algorithms, params) in runs:
        number = "" if first < 0 else f".{first}" if first == end else f".[{first}-{end}]"
        lead = f"{part}.{lead}" if part else lead
        many = end - first + 1
        blocks.append(_Block(f"{lead}{number}", count * many, kinds, algorithms, params * many))
    return blocks


def _left_out(skipped: Mapping[str, str]) -> list[str]:
    """Layers that were left out, by the reason."""
    by_reason: dict[str, list[str]] = {}
    for path, why in skipped.items():
        by_reason.setdefault(why, []).append(path)
    return [
        f"left out: {len(paths)} layers (first {shown(paths[0])}): {why}"
        if len(paths) > 1
        else f"left out: {shown(paths[0])}: {why}"
        for why, paths in by_reason.items()
    ]


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def plan_checkpoint(
    base: PathLike,
    what: Algorithm | Sequence[Rule] | PathLike,
    *,
    targets: str | Sequence[str] = "all",
    train_norm: bool = False,
    allow_pickle: bool = False,
) -> CheckpointPlan:
    """What `nerine.attach` with the same arguments would do on the model of a checkpoint; nothing is read but names.

    Raises:
        FormatError: the checkpoint cannot be read.
        TargetError: no layer is chosen.
        OptionError: the rules cannot be read, or targets are none.
    """
    rules: Algorithm | Sequence[Rule]
    rules = read_rules(what) if isinstance(what, str | os.PathLike) else what
    with open_weights(base, allow_pickle=allow_pickle) as weights:
        try:
            made = plan(weights.model, rules, targets=targets, train_norm=train_norm)
        except TargetError as error:
            asked = [targets] if isinstance(targets, str) else [*targets]
            asked += [] if isinstance(rules, Algorithm) else [r.match for r in rules if isinstance(r.match, str)]
            more = _packed(weights)
            if any(word.lstrip("!").startswith("type:") for word in asked):
                more.append("A checkpoint knows no classes but torch's own layers: name layers by their path")
            raise TargetError(". ".join([str(error), *more])) from None
        return CheckpointPlan(os.fspath(base), made, tuple(_packed(weights)))


def _packed(weights: Weights) -> list[str]:
    """What is said of layers whose weights cannot be read."""
    if not weights.packed:
        return []
    formats = ", ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in weights.packed.values()))
    first = next(iter(weights.packed))
    return [
        f"{len(weights.packed)} layers (first {shown(first)}) are packed as {formats} and left out; give the "
        "checkpoint that they were made from"
    ]


# -- presets -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PresetRow:
    """A preset, a sentence about it, and how many layers of a model it chooses (None: of no model), or why none."""

    name: str
    about: str
    layers: int | None = None
    why: str = ""
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class PresetsReport:
    """The presets, and what they choose in a model."""

    rows: tuple[PresetRow, ...]
    model: str = ""
    of: int = 0
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        presets = [
            {"name": r.name, "about": r.about, "layers": r.layers, "why": r.why, "paths": list(r.paths)}
            for r in self.rows
        ]
        return {"model": self.model, "of": self.of, "presets": presets, "notes": list(self.notes)}

    def __str__(self) -> str:
        rows = [(r.name, "" if r.layers is None else r.layers, r.about) for r in self.rows]
        lines = [table(("preset", "layers", "what it chooses"), rows)]
        if self.model:
            lines += ["", f"of {self.of} layers in {self.model}"]
        lines += [f"{r.name}: 0 layers: {r.why}" for r in self.rows if r.why]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def preset_text(name: str) -> str:
    """The TOML of a preset, ours or a file of one's own.

    Raises:
        OptionError: there is none, or it is wrong.
    """
    preset_of(name)
    if name in PRESETS:
        return files("nerine.model.presets").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return Path(name).read_text(encoding="utf-8")


def presets_report(
    names: Sequence[str] = PRESETS, model: PathLike | None = None, *, allow_pickle: bool = False
) -> PresetsReport:
    """Presets by their names, with the layers that each chooses in the checkpoint `model`, if one is given.

    Raises:
        OptionError: there is no such preset.
        FormatError: the checkpoint cannot be read.
    """
    for name in names:
        if not is_preset(name):
            raise OptionError(f"no preset is called {name!r}. {nearest(name, PRESETS)}")
    presets = [(name, preset_of(name)) for name in names]
    if model is None:
        return PresetsReport(tuple(PresetRow(name, preset.about) for name, preset in presets))
    with open_weights(model, allow_pickle=allow_pickle) as weights:
        rows = []
        for name, preset in presets:
            paths = choose(weights.model, preset).paths
            why = "" if paths else _why_nothing(weights, preset)
            rows.append(PresetRow(name, preset.about, len(paths), why, paths))
        kinds = ("linear", "conv", "transposed")
        count = sum(site.kind in kinds and not site.experts for site in weights.sites.values())
        return PresetsReport(tuple(rows), os.fspath(model), count, tuple(_packed(weights)))


def _why_nothing(weights: Weights, preset: Preset) -> str:
    """Why a preset chooses no layer, in a few words."""
    model = weights.model
    if "nothing to adapt" in why_nothing(model, preset):
        return "the checkpoint has no layer that could have an adapter"
    parts = list(model.children()) if isinstance(model, Parts) else [model]
    if "text_encoder" not in preset.sections and all(Structure(part).is_text_encoder() for part in parts):
        return "it takes nothing of text encoders, and this is one: it embeds tokens and has no time step"
    return f"no layer is what it takes: {preset.about}"
