"""`nerine.lycoris.functional.general`; see `nerine.integrations.lycoris.functional.general`."""

from nerine.integrations.lycoris.functional.general import *  # noqa: F403
from nerine.integrations.lycoris.functional.general import __all__  # noqa: F401
