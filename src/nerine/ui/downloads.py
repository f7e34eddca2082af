"""What the page offers for download: files that a tool has just written, and pages kept in memory, under addresses that
nobody can guess. No path comes from outside, so none can lead anywhere else.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from pathlib import Path

__all__ = ["Downloads"]

MOST = 64


class Downloads:
    """{address: a file, or a text}; the oldest is forgotten when there are too many."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[str, tuple[str, Path | str]] = OrderedDict()

    def add(self, name: str, content: Path | str) -> str:
        """Offer a file (a Path) or a text under a name; the address, relative to that of the page."""
        key = secrets.token_urlsafe(16)
        with self._lock:
            self._held[key] = (name, content)
            while len(self._held) > MOST:
                self._held.popitem(last=False)
        return f"download/{key}/{_plain(name)}"

    def get(self, key: str) -> tuple[str, Path | str] | None:
        """The name and the content of an address."""
        with self._lock:
            return self._held.get(key)


def _plain(name: str) -> str:
    """A name that stands in an address without any escapes."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name)[-80:] or "file"
