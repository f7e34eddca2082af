"""The two hashes by which other programs recognise an adapter file, taken while the file is written.

They are those of a file that has the same tensors and only the `ss_` metadata, so that a change of title or author
leaves them alone: the SHA-256 of its data, and the first eight digits of the SHA-256 of 64 KiB that begin 1 MiB into
it (of nothing, where it is shorter).
Source: sd-scripts, precalculate_safetensors_hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

__all__ = ["PLACEHOLDERS", "Hashes"]

_FULL, _LEGACY = "sshs_model_hash", "sshs_legacy_hash"
_WINDOW = range(2**20, 2**20 + 2**16)
PLACEHOLDERS: Mapping[str, str] = {_FULL: "0" * 64, _LEGACY: "0" * 8}


class Hashes:
    """Both hashes of a file that begins with `header`, fed with its data piece by piece."""

    def __init__(self, header: bytes) -> None:
        self._data = hashlib.sha256()
        self._window = hashlib.sha256(header[_WINDOW.start : _WINDOW.stop])
        self._at = len(header)

    def update(self, piece: memoryview) -> None:
        """The next bytes of the data."""
        self._data.update(piece)
        begin, end = max(_WINDOW.start - self._at, 0), max(_WINDOW.stop - self._at, 0)
        self._window.update(piece[begin:end])
        self._at += len(piece)

    def metadata(self) -> dict[str, str]:
        """The entries of the metadata, of the same lengths as `PLACEHOLDERS`."""
        return {_FULL: self._data.hexdigest(), _LEGACY: self._window.hexdigest()[:8]}
