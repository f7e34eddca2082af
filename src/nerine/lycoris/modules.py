"""`nerine.lycoris.modules`: LyCORIS's module classes; see `nerine.integrations.lycoris.modules`."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(import_module("nerine.integrations.lycoris.modules"), name)
