"""`nerine.lycoris.config`: the presets that LyCORIS comes with; see `nerine.integrations.lycoris.presets`."""

from nerine.integrations.lycoris.presets import *  # noqa: F403
from nerine.integrations.lycoris.presets import __all__  # noqa: F401
