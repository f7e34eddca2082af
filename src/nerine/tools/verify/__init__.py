"""Whether train = merge = export = reload holds for one file on its base, layer by layer and in numbers."""

from __future__ import annotations

from nerine.tools.verify.report import LayerCheck, Promise, VerifyReport
from nerine.tools.verify.verification import verify

__all__ = ["LayerCheck", "Promise", "VerifyReport", "verify"]
