"""Optimiser groups as sd-scripts wants them: by rule, by block, and with LoRA+ the carriers of size apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nerine.integrations.kohya.layers import Choice
from nerine.integrations.lycoris.hosted import Hosted
from nerine.integrations.lycoris.settings import logger

__all__ = ["Rates", "groups"]


@dataclass(frozen=True)
class Rates:
    """LoRA+: the multiples of the learning rate for the tensors that carry the size of the change (Hayou et al.,
    arXiv:2402.12354), for all and for either side."""

    both: float | None = None
    unet_ratio: float | None = None
    text_encoder_ratio: float | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Rates:
        """Those among the arguments."""
        names = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
        return cls(*(given.get(name) for name in names))

    @property
    def unet(self) -> float | None:
        return self.unet_ratio or self.both

    @property
    def text_encoder(self) -> float | None:
        return self.text_encoder_ratio or self.both


def groups(
    loras: Sequence[Hosted], choices: Mapping[str, Choice], rate: float | None, ratio: float | None, label: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """(groups, what each is called): one for each rule with a rate of its own, each block and the rest, each of those
    in two with LoRA+. Groups without a rate are left out."""
    found: dict[tuple[str, bool], list[nn.Parameter]] = {}
    rates: dict[str, float | None] = {}
    for lora in loras:
        name, own = _named(choices.get(lora.lora_name), rate, label)
        rates[name] = own
        for key, parameter in lora.adapter.named_parameters(recurse=False):
            plus = ratio is not None and key in lora.adapter.carriers
            found.setdefault((name, plus), []).append(parameter)
    params, names = [], []
    for (name, plus), tensors in sorted(found.items(), key=lambda item: item[0][1]):
        own = rates[name]
        if not own:
            logger.info("%s: no learning rate, not trained", name)
            continue
        params.append({"params": tensors, "lr": own * ratio if plus and ratio is not None else own})
        names.append(f"{name} plus" if plus else name)
    return params, names


def _named(choice: Choice | None, rate: float | None, label: str) -> tuple[str, float | None]:
    """What the group of a layer is called, and its rate."""
    if choice is None:
        return label, rate
    if choice.lr is not None:
        return f"{label} reg_lr_{choice.lr[0]}", choice.lr[1]
    if choice.block is not None:
        return f"{label}_block{choice.block}", None if rate is None else rate * choice.lr_weight
    return label, rate
