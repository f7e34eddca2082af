"""`nerine.lycoris.config_sdk`: what presets and algorithms are; see `nerine.integrations.lycoris.presets`."""

from nerine.integrations.lycoris.presets import *  # noqa: F403
from nerine.integrations.lycoris.presets import __all__  # noqa: F401
