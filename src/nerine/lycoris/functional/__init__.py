"""LyCORIS's functional module under nerine's roof; see `nerine.integrations.lycoris.functional`."""

from nerine.integrations.lycoris.functional import *  # noqa: F403
from nerine.integrations.lycoris.functional import __all__  # noqa: F401
