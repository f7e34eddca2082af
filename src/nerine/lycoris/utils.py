"""`nerine.lycoris.utils`: LyCORIS's tools for tensors; see `nerine.integrations.lycoris.extraction`."""

from nerine.integrations.lycoris.extraction import *  # noqa: F403
from nerine.integrations.lycoris.extraction import __all__  # noqa: F401
