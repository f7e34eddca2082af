"""nerine: fine-tune models beyond LoRA, with one promise: train = merge = export = reload.

    import nerine

    network = nerine.attach(model, nerine.DoRA(nerine.LoKr(rank=8)))
    ...  # train network.parameters()
    nerine.save(network, "style.safetensors")
    nerine.load(other_model, "style.safetensors", strength=0.8).merge()

The names below are all there is in public; each is imported when it is first asked for, so that the command line
answers before torch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nerine.version import __version__

if TYPE_CHECKING:
    from nerine.algorithms import (
        BOFT,
        IA3,
        DiagOFT,
        DoRA,
        DyLoRA,
        Full,
        GLoRA,
        LoHa,
        LoKr,
        LoRA,
        Norm,
        OFTv2,
        TLoRA,
    )
    from nerine.api import load, save
    from nerine.errors import (
        DeviceError,
        FormatError,
        MergeError,
        MissingExtra,
        NerineError,
        OptionError,
        ShapeError,
        TargetError,
        UnsupportedBase,
    )
    from nerine.model.fitting import attach
    from nerine.model.network import Network
    from nerine.model.parametrize import parametrize
    from nerine.model.plan import plan
    from nerine.model.targets import Rule

_HOMES = {
    "nerine.algorithms": (
        "BOFT",
        "DiagOFT",
        "DoRA",
        "DyLoRA",
        "Full",
        "GLoRA",
        "IA3",
        "LoHa",
        "LoKr",
        "LoRA",
        "Norm",
        "OFTv2",
        "TLoRA",
    ),
    "nerine.api": ("load", "save"),
    "nerine.errors": (
        "DeviceError",
        "FormatError",
        "MergeError",
        "MissingExtra",
        "NerineError",
        "OptionError",
        "ShapeError",
        "TargetError",
        "UnsupportedBase",
    ),
    "nerine.model.fitting": ("attach",),
    "nerine.model.network": ("Network",),
    "nerine.model.parametrize": ("parametrize",),
    "nerine.model.plan": ("plan",),
    "nerine.model.targets": ("Rule",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BOFT",
    "IA3",
    "DeviceError",
    "DiagOFT",
    "DoRA",
    "DyLoRA",
    "FormatError",
    "Full",
    "GLoRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "MergeError",
    "MissingExtra",
    "NerineError",
    "Network",
    "Norm",
    "OFTv2",
    "OptionError",
    "Rule",
    "ShapeError",
    "TLoRA",
    "TargetError",
    "UnsupportedBase",
    "__version__",
    "attach",
    "load",
    "parametrize",
    "plan",
    "save",
]


if not TYPE_CHECKING:  # a checker would take any misspelt name for one that may come from here

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'nerine' has no attribute {name!r}")
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
