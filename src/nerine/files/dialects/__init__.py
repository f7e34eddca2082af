"""Dialects: how other programs name and shape the same tensors. One file each; the table is here."""

from __future__ import annotations

from nerine.files.dialects.lycoris import Lycoris

__all__ = ["DIALECTS", "Lycoris"]

DIALECTS = {Lycoris.name: Lycoris()}
