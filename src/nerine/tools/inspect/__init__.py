"""What is in an adapter file: read layer by layer, measured, and judged."""

from __future__ import annotations

from nerine.tools.inspect.inspection import inspect
from nerine.tools.inspect.report import Block, Finding, InspectReport, LayerRow
from nerine.tools.inspect.training import Dataset, Tag, Training

__all__ = ["Block", "Dataset", "Finding", "InspectReport", "LayerRow", "Tag", "Training", "inspect"]
