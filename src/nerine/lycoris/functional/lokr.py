"""`nerine.lycoris.functional.lokr`; see `nerine.integrations.lycoris.functional.lokr`."""

from nerine.integrations.lycoris.functional.lokr import *  # noqa: F403
from nerine.integrations.lycoris.functional.lokr import __all__  # noqa: F401
