"""Which layers a LyCORIS preset chooses, and what each gets: LyCORIS's walk through a model, restated.

The walk goes through the modules in their order. A module whose class is a target is a *block*: every linear layer and
convolution below it is taken. A module whose path is a target is taken itself. `module_algo_map` has options for the
blocks of a class, also where they stand within another block; `name_algo_map` for paths. Patterns are regular
expressions that must fit the beginning of a path, or with `use_fnmatch` shell patterns for the whole of it.

Here a layer is taken once, as the walk first meets it; LyCORIS's kohya network stops where blocks overlap.
This file knows neither algorithms nor adapters, only modules and their paths.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nerine.errors import OptionError
from nerine.model.layer import CONVS, layer_kind

__all__ = ["WRAPPER_TARGETS", "Targets", "selected", "targets_of", "unmatched"]

LLM_ADAPTER = "LLMAdapterTransformerBlock"

Options = dict[str, Any]


@dataclass(frozen=True)
class Targets:
    """The classes whose layers are taken, and the patterns of the paths that are taken themselves."""

    modules: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


WRAPPER_TARGETS = Targets(("Linear", "Conv1d", "Conv2d", "Conv3d", "GroupNorm", "LayerNorm"))


def targets_of(preset: Mapping[str, Any], part: str = "", default: Targets = WRAPPER_TARGETS) -> Targets:
    """The targets of a preset: for the wrapper, or for the `part` "unet" or "text_encoder" of sd-scripts.

    The wrapper counts the keys of both maps among its targets; sd-scripts' network does not.
    """
    prefix = f"{part}_" if part else ""
    modules = tuple(preset.get(f"{prefix}target_module", default.modules) or ())
    names = tuple(preset.get(f"{prefix}target_name", default.names) or ())
    if not part:
        modules += tuple(preset.get("module_algo_map") or ())
        names += tuple(preset.get("name_algo_map") or ())
    return Targets(tuple(dict.fromkeys(modules)), tuple(dict.fromkeys(names)))


def selected(
    root: nn.Module,
    preset: Mapping[str, Any],
    *,
    target_modules: Sequence[str],
    target_names: Sequence[str],
    train_norm: bool = False,
    train_llm_adapter: bool = False,
) -> dict[str, Options]:
    """Path of each chosen layer -> its own options (algo, dim, alpha, ...), in the order of LyCORIS.

    `target_modules` are names of classes and `target_names` patterns of paths, from `targets_of`. Of the preset count
    `enable_conv` (without it only convolutions of one tap are taken, and those whose options have a `dim`), both maps,
    `exclude_name` and `use_fnmatch`. With `train_norm` norms are taken too, with "norm" as their algo.

    Raises:
        OptionError: a pattern that is no regular expression, or a value of the wrong kind.
    """
    walk = _Walk(root, preset, _without_llm(target_modules, train_llm_adapter), tuple(target_names), train_norm)
    walk.run()
    return walk.found


def unmatched(
    root: nn.Module,
    preset: Mapping[str, Any],
    *,
    target_modules: Sequence[str],
    target_names: Sequence[str],
    train_llm_adapter: bool = False,
) -> Targets:
    """The targets that nothing in the model matches, sorted."""
    modules = _without_llm(target_modules, train_llm_adapter)
    walk = _Walk(root, preset, modules, tuple(target_names), False)
    walk.run()
    return Targets(tuple(sorted(set(modules) - walk.seen_modules)), tuple(sorted(set(target_names) - walk.seen_names)))


def _without_llm(modules: Sequence[str], train_llm_adapter: bool) -> tuple[str, ...]:
    return tuple(name for name in modules if train_llm_adapter or name != LLM_ADAPTER)


def _is_linear(module: nn.Module) -> bool:
    """A linear layer, or one of the class by which some programs keep weights in float8."""
    if isinstance(module, nn.Linear):
        return True
    parts = ("in_features", "out_features", "weight", "weight_scale")
    return type(module).__name__ == "Fp8Linear" and all(hasattr(module, part) for part in parts)


def _is_trainable_norm(module: nn.Module) -> bool:
    """A norm that has something to train; LyCORIS fails on those without a weight and passes over RMSNorm."""
    return (
        "Norm" in type(module).__name__
        and layer_kind(module) == "norm"
        and module._parameters.get("weight") is not None
    )


@dataclass
class _Walk:
    """One walk: what it looks for, and what it has found so far."""

    root: nn.Module
    preset: Mapping[str, Any]
    target_modules: Collection[str]
    target_names: Collection[str]
    train_norm: bool
    found: dict[str, Options] = field(default_factory=dict)
    seen_modules: set[str] = field(default_factory=set)
    seen_names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.enable_conv = bool(self.preset.get("enable_conv", True))
        self.by_module = _map(self.preset, "module_algo_map")
        self.by_name = _map(self.preset, "name_algo_map")
        self.exclude = tuple(self.preset.get("exclude_name") or ())
        self.fits = _matcher(bool(self.preset.get("use_fnmatch")), (*self.target_names, *self.by_name, *self.exclude))
        self.taken: set[int] = set()

    def run(self) -> None:
        for path, module in self._modules(self.root, ""):
            kind = type(module).__name__
            fitting = [pattern for pattern in self.target_names if self.fits(pattern, path)]
            if kind in self.target_modules and not fitting:
                self.seen_modules.add(kind)
                self._descend(path, module, dict(self.by_module.get(kind, {})))
            elif fitting or path in self.target_names:
                self.seen_modules.add(kind)
                self.seen_names.update(fitting, [path])
                self._take(path, module, self._options_at(path, kind))

    def _modules(self, block: nn.Module, above: str) -> Iterator[tuple[str, nn.Module]]:
        """Every module of a block under its path in the model, less those excluded and what nerine has put there."""
        for name, module in block.named_modules():
            path = ".".join(part for part in (above, name) if part)
            if ".nerine" not in f".{path}" and not self._is_excluded(path):
                yield path, module

    def _is_excluded(self, path: str) -> bool:
        return bool(path) and (path in self.exclude or any(self.fits(pattern, path) for pattern in self.exclude))

    def _options_at(self, path: str, kind: str) -> Options:
        """Those of the path itself, of the first pattern that fits it, or of its class."""
        if path in self.by_name:
            return dict(self.by_name[path])
        fitting = next((own for pattern, own in self.by_name.items() if self.fits(pattern, path)), None)
        return dict(self.by_module.get(kind, {}) if fitting is None else fitting)

    def _descend(self, above: str, block: nn.Module, options: Options) -> None:
        """Take every layer of a block; a block within it that has options of its own begins anew with those."""
        for path, module in self._modules(block, above):
            kind = type(module).__name__
            if kind in self.by_module and module is not block:
                inherited = {"algo": options["algo"]} if "algo" in options else {}
                self._descend(path, module, {**inherited, **self.by_module[kind]})
            else:
                self._take(path, module, options)

    def _take(self, path: str, module: nn.Module, options: Options) -> None:
        if id(module) in self.taken:
            return
        if self.train_norm and "Norm" in type(module).__name__:
            if not _is_trainable_norm(module):
                return
            options = {**options, "algo": "norm"}
        elif isinstance(module, CONVS):
            if module.kernel_size[0] != 1 and not self.enable_conv and not options.get("dim"):
                return
        elif not _is_linear(module):
            return
        self.taken.add(id(module))
        self.found[path] = dict(options)


def _map(preset: Mapping[str, Any], key: str) -> Mapping[str, Mapping[str, Any]]:
    """One of the two maps of a preset.

    Raises:
        OptionError: it, or an entry, is no table.
    """
    found = preset.get(key) or {}
    if not isinstance(found, Mapping):
        raise OptionError(f"{key}: expected a table such as {{pattern: {{'algo': 'lokr', 'dim': 8}}}}, got {found!r}")
    entries = {}
    for name, options in found.items():
        options = options.to_dict() if hasattr(options, "to_dict") else options or {}
        if not isinstance(options, Mapping):
            raise OptionError(
                f"{key}: {name!r}: expected a table such as {{'algo': 'lokr', 'dim': 8}}, got {options!r}"
            )
        entries[name] = options
    return entries


def _matcher(use_fnmatch: bool, patterns: Collection[str]) -> Callable[[str, str], bool]:
    """Whether a pattern fits a path.

    Raises:
        OptionError: one of the patterns is no regular expression.
    """
    if use_fnmatch:
        return lambda pattern, path: fnmatch.fnmatchcase(path, pattern)
    compiled = {}
    for pattern in patterns:
        try:
            compiled[pattern] = re.compile(pattern)
        except re.error as error:
            raise OptionError(
                f"the pattern {pattern!r} is not a regular expression: {error}; shell patterns such as '*.attn.*' "
                "need use_fnmatch = true"
            ) from None
    return lambda pattern, path: compiled[pattern].match(path) is not None
