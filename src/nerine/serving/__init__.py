"""Many adapters on one model: each sample of a batch may have another, and none is attached.

Above `api` because a shelf reads files; what it puts on a layer is one function (`Mount.served`), so that neither the
layer nor its algorithm knows that there are several.
"""

from nerine.serving.reports import ShelfReport
from nerine.serving.shelf import Shelf

__all__ = ["Shelf", "ShelfReport"]
