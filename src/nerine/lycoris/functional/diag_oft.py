"""`nerine.lycoris.functional.diag_oft`; see `nerine.integrations.lycoris.functional.diag_oft`."""

from nerine.integrations.lycoris.functional.diag_oft import *  # noqa: F403
from nerine.integrations.lycoris.functional.diag_oft import __all__  # noqa: F401
