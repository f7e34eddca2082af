"""`nerine.lycoris.functional.locon`; see `nerine.integrations.lycoris.functional.locon`."""

from nerine.integrations.lycoris.functional.locon import *  # noqa: F403
from nerine.integrations.lycoris.functional.locon import __all__  # noqa: F401
