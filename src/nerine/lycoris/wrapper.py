"""`nerine.lycoris.wrapper`: LyCORIS's networks for any model; see `nerine.integrations.lycoris.wrapper`."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(import_module("nerine.integrations.lycoris.wrapper"), name)
