"""Dialects: how other programs name and shape the same tensors. One file each; the table is here."""

from __future__ import annotations

from collections.abc import Mapping

from nerine.files.dialects.ai_toolkit import AiToolkit
from nerine.files.dialects.base import Dialect
from nerine.files.dialects.comfy import Bare, Comfy
from nerine.files.dialects.diffusers import Diffusers
from nerine.files.dialects.hcp import Hcp
from nerine.files.dialects.invokeai import InvokeAI
from nerine.files.dialects.kohya import Kohya
from nerine.files.dialects.lycoris import Lycoris
from nerine.files.dialects.onetrainer import OneTrainer
from nerine.files.dialects.peft import Peft

__all__ = ["DIALECTS", "Dialect"]

DIALECTS: Mapping[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Lycoris(),
        Kohya(),
        Diffusers(),
        Peft(),
        Comfy(),
        OneTrainer(),
        AiToolkit(),
        InvokeAI(),
        Hcp(),
        Bare(),
    )
}
