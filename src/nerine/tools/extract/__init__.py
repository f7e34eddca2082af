"""Extraction: an adapter out of two checkpoints, of a rank, an accuracy or a size.

`job` is the tool itself; `pairs` finds the layers of one checkpoint in the other, `plan` and `ranks` say which adapter
a layer gets, `options` and `spending` weigh adapters against each other for a size, `fitting` makes them.
"""

from __future__ import annotations

from nerine.tools.extract.job import extract
from nerine.tools.extract.report import Extracted, ExtractReport

__all__ = ["ExtractReport", "Extracted", "extract"]
