"""What people do with adapter files: functions from files to files that report and never print."""

from __future__ import annotations

from nerine.tools.convert import ConvertReport, convert
from nerine.tools.embeddings import embeddings

__all__ = ["ConvertReport", "convert", "embeddings"]
