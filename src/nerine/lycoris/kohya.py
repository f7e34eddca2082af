"""`nerine.lycoris.kohya`: the network module for sd-scripts; see `nerine.integrations.kohya`."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(import_module("nerine.integrations.kohya"), name)
