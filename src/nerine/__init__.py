"""nerine: fine-tune models beyond LoRA, with one promise: train = merge = export = reload.

import nerine

network = nerine.attach(model, nerine.DoRA(nerine.LoKr(rank=8)))
...  # train network.parameters()
nerine.save(network, "style.safetensors")
nerine.load(other_model, "style.safetensors", strength=0.8).merge()
"""

from nerine.algorithms import DoRA, LoHa, LoKr, LoRA
from nerine.api import load, save
from nerine.errors import (
    FormatError,
    MergeError,
    MissingExtra,
    NerineError,
    OptionError,
    ShapeError,
    TargetError,
    UnsupportedBase,
)
from nerine.model.network import Network, attach
from nerine.model.plan import plan
from nerine.model.targets import Rule
from nerine.version import __version__

__all__ = [
    "DoRA",
    "FormatError",
    "LoHa",
    "LoKr",
    "LoRA",
    "MergeError",
    "MissingExtra",
    "NerineError",
    "Network",
    "OptionError",
    "Rule",
    "ShapeError",
    "TargetError",
    "UnsupportedBase",
    "__version__",
    "attach",
    "load",
    "plan",
    "save",
]
