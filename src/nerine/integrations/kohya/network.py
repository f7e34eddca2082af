"""The network that sd-scripts drives: adapters for text encoders and denoiser, owned here and not by their layers.

sd-scripts freezes and casts its models after `apply_to`, which the adapters must not notice. What it asks of a network
is duck-typed; the members below are those that its trainers, `gen_img.py` and the inference scripts call.
Source: sd-scripts (train_network.py, gen_img.py, networks/lora*.py), LyCORIS's kohya plug-in.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nerine.errors import OptionError, TargetError
from nerine.files.reports import LoadReport
from nerine.files.store import Source
from nerine.integrations.kohya.layers import Choice, refine
from nerine.integrations.kohya.optimiser import Rates, groups
from nerine.integrations.kohya.parts import Part, is_t5, parts_of, view
from nerine.integrations.kohya.presets import choose
from nerine.integrations.kohya.regions import Region
from nerine.integrations.kohya.timesteps import listen
from nerine.integrations.lycoris.building import Defaults, Wish, build
from nerine.integrations.lycoris.hosted import Hosted
from nerine.integrations.lycoris.modules import hosted_of
from nerine.integrations.lycoris.network import LycorisNetwork
from nerine.integrations.lycoris.settings import logger
from nerine.model.adapter import Noise
from nerine.model.fitting import Fitting

__all__ = ["KohyaNetwork"]

Groups = tuple[list[dict[str, Any]], list[str]]


class KohyaNetwork(LycorisNetwork):
    """Adapters for one pipeline. `unet_loras` and `text_encoder_loras` are the modules, `loras` both.

    `defaults` are the ranks, alphas and options of all layers, `arguments` the `network_args`, parsed, and `preset` as
    `presets.resolve` gives it.
    """

    taken: Mapping[str, Tensor] | None  # the tensors that the adapters have their values from

    LORA_PREFIX_UNET: ClassVar[str] = "lora_unet"
    LORA_PREFIX_TEXT_ENCODER: ClassVar[str] = "lora_te"

    def __init__(
        self,
        text_encoder: Any,
        unet: nn.Module | None,
        defaults: Defaults,
        *,
        preset: Any = "full",
        arguments: Mapping[str, Any] | None = None,
        multiplier: float = 1.0,
    ) -> None:
        nn.Module.__init__(self)
        given = dict(arguments or {})
        self._begin_parts(text_encoder, unet, multiplier)
        self.rates = Rates.of(given)
        self.train_t5xxl = bool(given.get("train_t5xxl"))
        self.train_llm_adapter = bool(given.get("train_llm_adapter"))
        self.lora_dim, self.alpha = defaults.dim, defaults.alpha
        self.conv_lora_dim, self.conv_alpha = defaults.conv_dim, defaults.conv_alpha
        choices: list[tuple[Part, Choice]] = []
        for part in self.parts:
            if part.number and not self.train_t5xxl and is_t5(part.model):
                logger.info("%s: T5 is left alone; train_t5xxl=True trains it", part.key)
                continue
            found = choose(part, preset, given)
            choices += [(part, choice) for choice in refine(part, found, given)]
        self._make(choices, defaults)

    @classmethod
    def of(cls, text_encoder: Any, unet: nn.Module | None, multiplier: float) -> KohyaNetwork:
        """A network without adapters, for those of a file."""
        network = cls.__new__(cls)
        nn.Module.__init__(network)
        network._begin_parts(text_encoder, unet, multiplier)
        network.rates = Rates()
        network.train_t5xxl = network.train_llm_adapter = False
        return network

    def fill(
        self,
        fittings: Sequence[Fitting],
        report: LoadReport,
        tensors: Mapping[str, Tensor],
        noise: Noise,
        given: Mapping[str, Any],
    ) -> None:
        """Take the adapters of a file, whose tensors are `tensors`; `given` are parsed arguments."""
        named = {part.key: part for part in self.parts}
        for fitting in fittings:
            key, _, path = fitting.spot.path.partition(".")
            name = named[key].lora_name(path)
            self.loras.append(hosted_of(fitting, name, self.context, noise))
            found = refine(named[key], [Choice(path, name)], _rates_alone(given))
            self.choices.update((name, choice) for choice in found)
        self.report = report
        self.rates = Rates.of(given)
        self.train_t5xxl = any(part.number and is_t5(part.model) and self._has(part) for part in self.parts)
        self.taken = tensors
        self.set_multiplier(self.multiplier)
        self.count()

    def _has(self, part: Part) -> bool:
        return any(lora.lora_name.startswith(f"{part.prefix}_") for lora in self.loras)

    def _begin_parts(self, text_encoder: Any, unet: nn.Module | None, multiplier: float) -> None:
        self.parts = parts_of(text_encoder, unet)
        self._begin(view(self.parts), multiplier)
        self.choices: dict[str, Choice] = {}  # what was said of each layer, by its name in files
        self.taken = None
        self.clock: RemovableHandle | None = None
        self.mask_dic: dict[int, Tensor] | None = None
        self.region: Region | None = None

    def _make(self, choices: Sequence[tuple[Part, Choice]], defaults: Defaults) -> None:
        wishes: list[Wish] = []
        for part, choice in choices:
            for rows in choice.rows or (None,):
                name = choice.lora_name if rows is None else f"{choice.lora_name}[{rows[0]}:{rows[1]}]"
                wishes.append(Wish(f"{part.key}.{choice.path}", name, choice.options, rows))
                self.choices[name] = choice
        built = build(self.model, wishes, defaults, self.multiplier, self.context)
        self.loras, self.skipped = list(built.modules), built.skipped
        self.count()
        if not self.loras:
            why = next(iter(self.skipped.items()), None)
            raise TargetError(
                "no layer of the text encoders and the denoiser gets an adapter"
                + (f". {why[0]}: {why[1]}" if why else "; choose another preset, or other ranks")
            )

    @property
    def text_encoder_loras(self) -> list[Hosted]:
        """The modules of text encoders."""
        return [lora for lora in self.loras if lora.lora_name.startswith(self.LORA_PREFIX_TEXT_ENCODER)]

    @property
    def unet_loras(self) -> list[Hosted]:
        """The modules of the denoiser."""
        return [lora for lora in self.loras if not lora.lora_name.startswith(self.LORA_PREFIX_TEXT_ENCODER)]

    # -- on and off ----------------------------------------------------------------------------------------------
    def prepare_network(self, args: Any) -> None:
        """Asked before `apply_to`; there is nothing to prepare."""

    def apply_to(
        self, text_encoder: Any = None, unet: Any = None, apply_text_encoder: bool = True, apply_unet: bool = True
    ) -> None:
        """Put the adapters on their layers, of text encoders and denoiser as asked; the others are dropped."""
        kept = [*(self.text_encoder_loras if apply_text_encoder else ()), *(self.unet_loras if apply_unet else ())]
        logger.info("adapters on %d of %d layers", len(kept), len(self.loras))
        if not kept:
            raise TargetError("nothing to train: the network has no adapters for the parts that are trained")
        self.loras = kept
        self._put_all(kept)
        denoiser = next((part.model for part in self.parts if part.number == 0), None)
        if denoiser is not None and any(lora.algo == "tlora" for lora in kept):
            self.clock = listen(denoiser, self.context)

    def restore(self) -> None:
        """Take them off."""
        self._leave_region()
        if self.clock is not None:
            self.clock.remove()
            self.clock = None
        super().restore()

    def merge_to(  # type: ignore[override]
        self,
        text_encoder: Any = None,
        unet: Any = None,
        weights_sd: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
        **_: Any,
    ) -> None:
        """Put the adapters into the weights for good at the network's multiplier, as one sum in fp32 rounded once to
        the number format of each weight; `dtype` and `device` are where others would do the sum."""
        if weights_sd is not None and weights_sd is not self.taken:
            self._take(Source.of(weights_sd))
        super().merge_to(self.multiplier)

    # -- learning rates ------------------------------------------------------------------------------------------
    def set_loraplus_lr_ratio(self, ratio: float | None, unet: float | None, text_encoder: float | None) -> None:
        """LoRA+: the multiples of the rate for tensors that carry the size of the change."""
        self.rates = Rates(ratio, unet, text_encoder)

    def prepare_optimizer_params(  # type: ignore[override]
        self, text_encoder_lr: Any = None, unet_lr: float | None = None, learning_rate: float | None = None
    ) -> Groups:
        """(optimiser groups, what each is called in logs); groups without a rate are left out."""
        return self.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, learning_rate)

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: Any = None, unet_lr: float | None = None, default_lr: float | None = None
    ) -> Groups:
        """The same with a rate for each text encoder: a list, of which a single entry is for all, or one number.

        Raises:
            OptionError: every rate is zero, or the list is too short.
        """
        self.requires_grad_(True)
        params: list[dict[str, Any]] = []
        names: list[str] = []
        encoders = [part for part in self.parts if part.number]
        for i, part in enumerate(encoders):
            loras = [lora for lora in self.text_encoder_loras if lora.lora_name.startswith(f"{part.prefix}_")]
            label = "textencoder" if len(encoders) == 1 else f"textencoder {part.number}"
            rate = _rate_of(text_encoder_lr, i, default_lr)
            _add(params, names, groups(loras, self.choices, rate, self.rates.text_encoder, label))
        rate = default_lr if unet_lr is None else unet_lr
        _add(params, names, groups(self.unet_loras, self.choices, rate, self.rates.unet, "unet"))
        if not params:
            raise OptionError(
                f"nothing would be trained: text_encoder_lr={text_encoder_lr}, unet_lr={unet_lr}, "
                f"learning_rate={default_lr} leave every group without a rate"
            )
        return params, names

    def on_step_start(self, *_: Any) -> None:
        """Asked before each step; there is nothing to do."""

    # -- files ---------------------------------------------------------------------------------------------------
    def save_weights(
        self, file: str | os.PathLike[str], dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write the adapters in the dialect of sd-scripts, with its two hashes; `dtype` casts the tensors."""
        self._write(file, dtype, metadata, "kohya")

    # -- gen_img.py: weights computed beforehand, and regions -----------------------------------------------------
    def backup_weights(self) -> None:
        """Asked before `pre_calculation`, which keeps the bits by itself."""

    def restore_weights(self) -> None:
        """Give the weights their bits back, where `pre_calculation` changed them."""
        if self.network is not None and self.network.is_merged:
            self.network.unmerge()

    def pre_calculation(self) -> None:
        """Put the adapters into the weights at the network's multiplier until `restore_weights`."""
        self.onfly_merge(self.multiplier)

    def set_region(self, sub_prompt_index: int, is_last_network: bool, mask: Tensor) -> None:
        """Act in one region of the picture and on one of the sub-prompts; `mask` `[height, width]` in 0 to 1."""
        self._leave_region()
        whole = torch.ones_like(mask) if mask.max() == 0 else mask
        encoders = {part.prefix for part in self.parts if part.number}
        self.region = Region(sub_prompt_index, is_last_network, whole)
        self.region.enter(self.loras, encoders)

    def set_current_generation(
        self,
        batch_size: int,
        num_sub_prompts: int,
        width: int,
        height: int,
        shared: dict[str, Any],
        ds_ratio: float | None = None,
    ) -> None:
        """What the coming picture is: its size in pixels, and how many sub-prompts share it. `shared` is passed to all
        networks of the picture."""
        if self.region is None:
            raise OptionError("set_current_generation: set_region comes first")
        lora = self.loras[0]
        self.region.begin(batch_size, num_sub_prompts, (height, width), shared, ds_ratio, lora.device, lora.dtype)
        self.mask_dic = self.region.masks

    def _leave_region(self) -> None:
        if self.region is not None:
            self.region.leave()
        self.region = None


def _rates_alone(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that set learning rates."""
    return {name: value for name, value in given.items() if name == "network_reg_lrs"}


def _add(params: list[dict[str, Any]], names: list[str], found: Groups) -> None:
    params += found[0]
    names += found[1]


def _rate_of(given: Any, index: int, default: float | None) -> float | None:
    """The rate of a text encoder."""
    if given is None or (isinstance(given, list | tuple) and not given):
        return default
    if not isinstance(given, list | tuple):
        return float(given)
    if len(given) == 1:
        return float(given[0])
    with suppress(IndexError):
        return float(given[index])
    raise OptionError(f"text_encoder_lr: {len(given)} rates, and text encoder {index + 1} has none")
