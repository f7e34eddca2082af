"""The LyCORIS dialect: `lycoris_<path with underscores>.<suffix>`, one `alpha` a layer, `dora_scale` for magnitudes.

Written exactly as LyCORIS writes it, but for two numbers that it rounds: alpha and `dora_scale` stay in fp32.
Source: files written by LyCORIS 3.x and 4.1.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from nerine.files.dialects.base import Dialect

__all__ = ["Lycoris"]


class Lycoris(Dialect):
    """LyCORIS's wrapper, and the programs that embed it."""

    name = "lycoris"
    about = "LyCORIS, SimpleTuner"
    prefixes: ClassVar[Mapping[str, str]] = {"lycoris_": ""}
    flat = True
    rows = True
