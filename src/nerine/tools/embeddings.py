"""`embeddings`: the textual inversions that an adapter file carries beside its layers."""

from __future__ import annotations

import os

from torch import Tensor

from nerine.files.dialects.base import EMBEDDINGS
from nerine.files.folder import open_adapter

__all__ = ["embeddings"]


def embeddings(file: str | os.PathLike[str], *, allow_pickle: bool = False) -> dict[str, dict[str, Tensor]]:
    """{trigger word: {name: vectors `[tokens, width]`}} of a file; the names say for which text encoder ("clip_l",
    "clip_g", "string_to_param.*", ...). Empty where it carries none.

    Raises:
        FormatError: the file cannot be read.
    """
    found: dict[str, dict[str, Tensor]] = {}
    with open_adapter(file, allow_pickle=allow_pickle) as source:
        for key in source.keys:
            if key.startswith(EMBEDDINGS) and key.count(".") >= 2:
                _, word, name = key.split(".", 2)
                found.setdefault(word, {})[name] = source.read(key)
    return found
