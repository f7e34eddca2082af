"""Suggestions: which adapter suits a change, by numbers.

`study` looks at every layer, `weighing` compares what they could have at equal bytes, `advice` says what follows from
it, `plot` draws it.
"""

from __future__ import annotations

from nerine.tools.suggest.job import suggest
from nerine.tools.suggest.plot import svg, write_plot
from nerine.tools.suggest.report import SuggestReport

__all__ = ["SuggestReport", "suggest", "svg", "write_plot"]
