"""The two hashes by which sd-scripts, A1111 and its extensions know a file, made while it is written.

    sshs_model_hash    sha256 of the bytes of all tensors
    sshs_legacy_hash   first 8 digits of the sha256 of 64 KiB at 1 MiB of the file that has `ss_` metadata only
Source: sd-scripts `library/train_util.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

__all__ = ["MODEL_HASH", "PLACEHOLDERS", "Hasher"]

MODEL_HASH, LEGACY_HASH = "sshs_model_hash", "sshs_legacy_hash"
PLACEHOLDERS: Mapping[str, str] = {MODEL_HASH: "0" * 64, LEGACY_HASH: "0" * 8}
_FROM, _COUNT = 0x100000, 0x10000


class Hasher:
    """Fed with the header that a file with `ss_` metadata only would have, then with its data as it goes by."""

    def __init__(self, header: bytes) -> None:
        self._all, self._some, self._at = hashlib.sha256(), hashlib.sha256(), 0
        self._window(header)

    def feed(self, data: memoryview) -> None:
        self._all.update(data)
        self._window(data)

    def _window(self, data: bytes | memoryview) -> None:
        start, stop = max(_FROM - self._at, 0), max(_FROM + _COUNT - self._at, 0)
        self._some.update(data[start:stop])
        self._at += len(data)

    def values(self) -> dict[str, str]:
        return {MODEL_HASH: self._all.hexdigest(), LEGACY_HASH: self._some.hexdigest()[:8]}
