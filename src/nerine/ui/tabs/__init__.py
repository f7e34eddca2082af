"""The tabs of the web app, one file each: a `build(bench)` that lays out fields and says what a click does. A tab turns
what its fields hold into the arguments of one tool, and the tool's report into markup; it computes nothing itself.
"""

from __future__ import annotations

__all__: list[str] = []
