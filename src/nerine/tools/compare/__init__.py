"""How far two adapter files are apart: layers matched, measured, and put together by block."""

from __future__ import annotations

from nerine.tools.compare.comparison import compare
from nerine.tools.compare.report import CompareReport, CompareRow, Together

__all__ = ["CompareReport", "CompareRow", "Together", "compare"]
