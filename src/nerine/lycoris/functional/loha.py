"""`nerine.lycoris.functional.loha`; see `nerine.integrations.lycoris.functional.loha`."""

from nerine.integrations.lycoris.functional.loha import *  # noqa: F403
from nerine.integrations.lycoris.functional.loha import __all__  # noqa: F401
