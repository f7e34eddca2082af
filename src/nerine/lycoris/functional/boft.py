"""`nerine.lycoris.functional.boft`; see `nerine.integrations.lycoris.functional.boft`."""

from nerine.integrations.lycoris.functional.boft import *  # noqa: F403
from nerine.integrations.lycoris.functional.boft import __all__  # noqa: F401
