"""LyCORIS's network: adapters that a host owns, for any module. `apply_to` puts them on.

The presets that `LycorisNetwork.apply_preset` sets stay on the class, for that is the interface; a network copies them
when it is made.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from re import match as begins
from typing import Any, ClassVar

import torch
from torch import nn

from nerine.api import Choice, read_params, save
from nerine.errors import MergeError, TargetError, nearest
from nerine.files.atomic import replacing
from nerine.files.reports import LoadReport
from nerine.files.store import Source
from nerine.integrations.lycoris.building import Defaults, Wish, build, overrides
from nerine.integrations.lycoris.hosted import Hosted, free_name, strengths
from nerine.integrations.lycoris.presets import VALID_PRESET_KEYS, PresetConfig
from nerine.integrations.lycoris.selection import Targets, selected, targets_of, unmatched
from nerine.integrations.lycoris.settings import logger
from nerine.integrations.lycoris.sources import PICKLED, source_of
from nerine.model.adapter import Context
from nerine.model.fitting import put_in
from nerine.model.network import Network

__all__ = ["LycorisNetwork"]


class LycorisNetwork(nn.Module):
    """Adapters for the layers of `module`; `loras` are the modules, one a layer.

    They are registered as children, under their `lora_name`, by `apply_to`; so `parameters()` and `state_dict()` have
    nothing before. `state_dict` has LyCORIS's keys.
    """

    ENABLE_CONV: ClassVar[bool] = True
    TARGET_REPLACE_MODULE: ClassVar[list[str]] = ["Linear", "Conv1d", "Conv2d", "Conv3d", "GroupNorm", "LayerNorm"]
    TARGET_REPLACE_NAME: ClassVar[list[str]] = []
    LORA_PREFIX: ClassVar[str] = "lycoris"
    MODULE_ALGO_MAP: ClassVar[Mapping[str, Any]] = {}
    NAME_ALGO_MAP: ClassVar[Mapping[str, Any]] = {}
    USE_FNMATCH: ClassVar[bool] = False
    TARGET_EXCLUDE_NAME: ClassVar[list[str]] = []

    _PRESET_NAMES: ClassVar[Mapping[str, str]] = {
        "enable_conv": "ENABLE_CONV",
        "target_module": "TARGET_REPLACE_MODULE",
        "target_name": "TARGET_REPLACE_NAME",
        "module_algo_map": "MODULE_ALGO_MAP",
        "name_algo_map": "NAME_ALGO_MAP",
        "lora_prefix": "LORA_PREFIX",
        "use_fnmatch": "USE_FNMATCH",
        "exclude_name": "TARGET_EXCLUDE_NAME",
    }

    model: nn.Module
    loras: list[Hosted]
    skipped: Mapping[str, str]
    algo_table: dict[str, int]
    report: LoadReport | None
    context: Context
    network: Network | None
    alpha: float | None
    conv_alpha: float | None

    @classmethod
    def apply_preset(cls, preset: Mapping[str, Any] | PresetConfig) -> type[LycorisNetwork]:
        """Set what the networks made after this choose; what the preset leaves out stays as it is.

        Raises:
            KeyError: an unknown key (as in LyCORIS), with the nearest known ones.
        """
        table = preset.to_dict() if isinstance(preset, PresetConfig) else preset
        for key in table:
            if key not in VALID_PRESET_KEYS:
                raise KeyError(f"Unknown preset key {key!r}. {nearest(key, VALID_PRESET_KEYS)}")
        for key, attribute in cls._PRESET_NAMES.items():
            if key in table:
                setattr(cls, attribute, table[key])
        return cls

    def __init__(
        self,
        module: nn.Module,
        multiplier: float = 1.0,
        lora_dim: int = 4,
        conv_lora_dim: int = 4,
        alpha: float | None = 1,
        conv_alpha: float | None = 1,
        use_tucker: bool = False,
        dropout: float = 0,
        rank_dropout: float = 0,
        module_dropout: float = 0,
        network_module: str = "locon",
        norm_modules: Any = None,
        train_norm: bool = False,
        init_only: bool = False,
        warn_on_unmatched: bool = True,
        train_llm_adapter: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self._begin(module, multiplier)
        self.lora_dim = 0 if init_only else lora_dim
        self.alpha = 1 if init_only else alpha
        self.conv_lora_dim = 0 if init_only or not self.ENABLE_CONV else int(conv_lora_dim)
        self.conv_alpha = None if conv_alpha is None else float(conv_alpha)
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout
        self.use_tucker = use_tucker
        self.train_llm_adapter = train_llm_adapter
        if init_only:
            return
        noise = {"dropout": dropout, "rank_dropout": rank_dropout, "module_dropout": module_dropout}
        own = {"algo": network_module, "use_tucker": use_tucker, **noise, **kwargs}
        options = overrides(own, type(self).__name__)
        defaults = Defaults(int(lora_dim), alpha, self.conv_lora_dim, self.conv_alpha, options)
        preset = self.preset()
        targets = targets_of(preset)
        where: dict[str, Any] = {"target_modules": targets.modules, "target_names": targets.names}
        where["train_llm_adapter"] = train_llm_adapter
        chosen = selected(module, preset, train_norm=train_norm, **where)
        if warn_on_unmatched:
            _warn(unmatched(module, preset, **where))
        wishes = [
            Wish(path, f"{self.LORA_PREFIX}_{path}".replace(".", "_"), overrides(given, path))
            for path, given in chosen.items()
        ]
        built = build(module, wishes, defaults, multiplier, self.context)
        self.loras = list(built.modules)
        self.skipped = built.skipped
        self.count()
        if not self.loras:
            raise TargetError(_nothing(module, self))

    def _begin(self, model: nn.Module, multiplier: float) -> None:
        self.multiplier = multiplier
        self.loras = []
        self.skipped = {}
        self.algo_table = {}
        self.report = None
        self.__dict__["model"] = model  # past torch, which would register it: it is the host's
        self.context = Context(model=weakref.ref(model))
        self.network = None  # the handle, once the adapters are on
        self._precise = 0.0

    def preset(self) -> dict[str, Any]:
        """What this class of networks chooses now, as a table."""
        return {key: getattr(self, attribute) for key, attribute in self._PRESET_NAMES.items()}

    def count(self) -> None:
        """Set `algo_table`: how many modules there are of each class."""
        self.algo_table = {}
        for lora in self.loras:
            kind = type(lora).__name__
            self.algo_table[kind] = self.algo_table.get(kind, 0) + 1
        logger.info("%d modules: %s", len(self.loras), self.algo_table)

    # -- matching, as LyCORIS's presets do it ---------------------------------------------------------------------
    def match_fn(self, pattern: str, name: str) -> bool:
        """Whether a pattern of a preset means a name."""
        return fnmatch(name, pattern) if self.USE_FNMATCH else bool(begins(pattern, name))

    def is_excluded(self, name: str, patterns: Sequence[str] | None = None) -> bool:
        """Whether `exclude_name` keeps a path out."""
        given = self.TARGET_EXCLUDE_NAME if patterns is None else patterns
        return bool(name) and any(name == pattern or self.match_fn(pattern, name) for pattern in given)

    def find_conf_for_name(self, name: str) -> Any:
        """The options that `name_algo_map` has for a path, or None."""
        if name in self.NAME_ALGO_MAP:
            return self.NAME_ALGO_MAP[name]
        return next((value for key, value in self.NAME_ALGO_MAP.items() if self.match_fn(key, name)), None)

    # -- on and off ----------------------------------------------------------------------------------------------
    def apply_to(self) -> None:
        """Put the adapters on their layers, and register them as children."""
        self._put_all(self.loras)

    def _put_all(self, loras: Sequence[Hosted]) -> None:
        self._put_on(loras)
        for lora in loras:
            if lora.lora_name not in self._modules:
                self.add_module(lora.lora_name, lora)

    def _put_on(self, loras: Sequence[Hosted]) -> None:
        if self.network is not None:
            return
        name = free_name(self.model, "lycoris")
        ready = [(lora.spot, lora.adapter) for lora in loras]
        self.network, _ = put_in(self.model, ready, name, own=False, freeze=False)
        for lora in loras:
            lora.applied_as = name
            lora.train(self.training)

    def restore(self) -> None:
        """Take them off; the model is bitwise what it was (but for what was merged for good)."""
        if self.network is not None:
            self.network.detach()
        self.network = None
        for lora in self.loras:
            lora.applied_as = ""

    def set_multiplier(self, multiplier: float) -> None:
        """The strength of all adapters."""
        self.multiplier = multiplier
        for lora in self.loras:
            lora.multiplier = multiplier

    # -- merging -------------------------------------------------------------------------------------------------
    def is_mergeable(self) -> bool:
        """Whether `merge_to` can be called: always. A weight that cannot take a merge says why when it is tried."""
        return True

    def merge_to(self, weight: float = 1.0, *, precise: bool = False) -> None:
        """Put the adapters into the weights at strength `weight`; they rest from then on, and are not counted twice.

        With `precise` the old bits are kept: further merges add to the strength, each result is rounded once from the
        old weights, and when the strengths sum up to zero the old bits are back.

        Raises:
            MergeError: a weight cannot take it. The weights are then as they were.
        """
        was_on = self.network is not None
        self._put_on(self.loras)
        network = self._handle("merge")
        if not precise:
            with strengths(self.loras, weight):
                network.merge(keep_original=False)
            if not was_on:
                self.restore()
            return
        total = self._precise + weight
        if network.is_merged:
            network.unmerge()
        if abs(total) > 1e-12:
            with strengths(self.loras, total):
                network.merge()
        self._precise = total
        if abs(total) <= 1e-12 and not self._modules:
            self.restore()

    def onfly_merge(self, weight: float = 1.0) -> None:
        """Put the adapters into the weights at strength `weight`, keeping the old bits for `onfly_restore`."""
        self._put_on(self.loras)
        with strengths(self.loras, weight):
            self._handle("merge").merge()

    def onfly_restore(self) -> None:
        """Give the weights their bits back.

        Raises:
            MergeError: nothing is merged.
        """
        self._handle("restore").unmerge()
        if not self._modules:
            self.restore()

    def _handle(self, doing: str) -> Network:
        if self.network is None:
            raise MergeError(f"the adapters are not on the model: apply_to comes first, then {doing}")
        return self.network

    # -- training ------------------------------------------------------------------------------------------------
    def apply_max_norm_regularization(self, max_norm_value: float, device: Any = None) -> tuple[int, float, float]:
        """Shrink the adapters whose |W' - W| is larger; (how many were, the mean norm, the largest norm)."""
        found = self._handle("max norm").max_norm(float(max_norm_value))
        return found.shrunk, found.mean, found.largest

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: adapters keep little for the backward pass, and work under the model's own checkpointing."""

    def prepare_optimizer_params(self, lr: float | None = None) -> list[dict[str, Any]]:
        """One group with the trained tensors."""
        self.requires_grad_(True)
        group: dict[str, Any] = {"params": [p for lora in self.loras for p in lora.parameters()]}
        return [group if lr is None else {**group, "lr": lr}]

    def prepare_grad_etc(self, *_: Any) -> None:
        """Switch the training of all tensors on."""
        self.requires_grad_(True)

    def on_epoch_start(self, *_: Any) -> None:
        """Switch dropouts on."""
        self.train()

    def get_trainable_params(self, *_: Any) -> Iterator[nn.Parameter]:
        """The trained tensors."""
        return self.parameters()

    # -- files ---------------------------------------------------------------------------------------------------
    def load_weights(self, file: str | os.PathLike[str]) -> dict[str, list[str]]:
        """Take the tensors of a file, in any dialect; {"missing keys": layers, "unexpected keys": keys}, of which those
        that are empty are left out.

        Raises:
            FormatError: damaged, or nothing in it belongs here.
            ShapeError: it has other adapters than this network.
        """
        with source_of(file, None) as source:
            return self._take(source)

    def _take(self, source: Source) -> dict[str, list[str]]:
        placed = {lora.spot.path: (lora.spot, lora.adapter) for lora in self.loras}
        self.report, found = read_params(self.model, placed, source, Choice())
        if self.network is not None:
            self.network.not_merged("load tensors")
        by_path = {lora.spot.path: lora for lora in self.loras}
        for path, params in found.items():
            by_path[path].adapter.take(params)
        odd = {"missing keys": [by_path[p].lora_name for p in self.report.missing]}
        odd["unexpected keys"] = list(self.report.unmatched)
        return {key: names for key, names in odd.items() if names}

    def save_weights(
        self, file: str | os.PathLike[str], dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write the adapters in LyCORIS's dialect, whole or not at all; `dtype` casts the tensors.

        Raises:
            FormatError: the folder does not exist, or two layers would bear one name.
        """
        self._write(file, dtype, metadata, "lycoris")

    def _write(
        self, file: str | os.PathLike[str], dtype: torch.dtype | None, metadata: Mapping[str, str] | None, dialect: str
    ) -> None:
        if Path(file).suffix.lower() in PICKLED:
            state = {key: t.cpu() if dtype is None else t.cpu().to(dtype) for key, t in self.state_dict().items()}
            with replacing(Path(file)) as stream:
                torch.save(state, stream)
            return
        about = {key: str(value) for key, value in (metadata or {}).items() if key not in ("nerine", "format")}
        save(self._handle("save"), file, dialect=dialect, dtype=dtype, metadata=about, hashes=True)


def _warn(targets: Targets) -> None:
    """Say which targets nothing matches."""
    for words, what in ((targets.modules, "classes of modules"), (targets.names, "names")):
        if words:
            logger.warning("nothing in the model matches these %s of the preset: %s", what, ", ".join(words))


def _nothing(model: nn.Module, network: LycorisNetwork) -> str:
    """Why no layer has an adapter."""
    if network.skipped:
        path, why = next(iter(network.skipped.items()))
        return f"every layer that the preset chooses was left out. {path}: {why}"
    kinds = sorted({type(m).__name__ for m in model.modules() if not m._parameters})
    return (
        f"the preset chooses no layer of {type(model).__name__}: target_module={network.TARGET_REPLACE_MODULE}, "
        f"target_name={network.TARGET_REPLACE_NAME}. Its classes: {', '.join(kinds[:20])}"
    )
