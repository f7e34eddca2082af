"""PEFT's `adapter_config.json`: what reading needs of it, and what writing puts there.

diffusers keeps the same settings in the header of a file, each with the component before its name.
Source: PEFT 0.21 `tuners/*/config.py`, `utils/other.py`; diffusers 0.42 `loaders/lora_base.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nerine.errors import FormatError

__all__ = ["PeftConfig", "common", "exact", "patterns"]


@dataclass(frozen=True)
class PeftConfig:
    """The settings of one PEFT adapter; an empty mapping is a file without any."""

    values: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    @property
    def kind(self) -> str:
        """LORA, LOHA, LOKR, IA3, OFT, ..."""
        return str(self.values.get("peft_type") or "LORA").rsplit(".", 1)[-1].upper()

    def number(self, name: str, default: float) -> float:
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise FormatError(f"{self.where}: {name} must be a number, got {value!r}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name, default)
        return default if value is None else bool(value)

    def _by_pattern(self, name: str, path: str, default: float) -> float:
        """The number of the first pattern that matches the path, as PEFT matches them."""
        patterns = self.values.get(name) or {}
        if not isinstance(patterns, Mapping):
            raise FormatError(f"{self.where}: {name} must be a table of patterns, got {patterns!r}")
        for pattern, value in patterns.items():
            try:
                hit = re.match(rf"(.*\.)?({pattern})$", path)
            except re.error as error:
                raise FormatError(f"{self.where}: {name} has {pattern!r}, no regular expression: {error}") from error
            if hit:
                return PeftConfig({name: value}, self.where).number(name, default)
        return default

    def scale(self, path: str, rank: int) -> float:
        """alpha / rank of a layer whose tensors have `rank`; one where the config says nothing of alpha."""
        rank = int(self._by_pattern("rank_pattern", path, self.number("r", rank))) or rank
        alpha = self.number("lora_alpha", self.number("alpha", float("nan")))
        alpha = self._by_pattern("alpha_pattern", path, alpha)
        if math.isnan(alpha):
            return 1.0
        return alpha / (math.sqrt(rank) if self.flag("use_rslora") else rank)

    def matches_feedforward(self, path: str) -> bool:
        """Whether an IA3 adapter of that path acts on the inputs."""
        names = self.values.get("feedforward_modules") or []
        if isinstance(names, str):
            return re.fullmatch(names, path) is not None
        return any(path == name or path.endswith(f".{name}") for name in names)

    @classmethod
    def of_component(cls, text: str, component: str, where: str) -> PeftConfig:
        """The settings of a component in the text that diffusers puts into the header; empty where it has none.

        Raises:
            FormatError: it is no JSON object.
        """
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{where}: its lora_adapter_metadata is no JSON ({error})") from error
        if not isinstance(whole, dict):
            raise FormatError(f"{where}: its lora_adapter_metadata must be a table, got {type(whole).__name__}")
        lead = f"{component}."
        return cls({key[len(lead) :]: value for key, value in whole.items() if key.startswith(lead)}, where)


def common(numbers: Mapping[str, float]) -> float:
    """The number that most layers have; the smallest of equals."""
    counts = Counter(numbers.values())
    return max(sorted(counts), key=lambda value: counts[value])


def patterns(numbers: Mapping[str, float], usual: float) -> dict[str, float]:
    """{pattern that matches exactly one path: its number} for the layers that differ from the usual."""
    return {exact(path): _plain(value) for path, value in sorted(numbers.items()) if value != usual}


def exact(path: str) -> str:
    """A pattern of PEFT's that matches this path and none that ends in it."""
    return f"^{re.escape(path)}"


def _plain(value: float) -> float:
    return int(value) if float(value).is_integer() else value
