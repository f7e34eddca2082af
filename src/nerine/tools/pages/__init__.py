"""Reports as pages for a browser: one file each, nothing fetched, everything from files escaped."""

from __future__ import annotations

from nerine.tools.pages.page import page

__all__ = ["page"]
