"""Layer names in files. Flattening a path ("a.b_c" -> "a_b_c") cannot be undone, so names are looked up, not parsed."""

from __future__ import annotations

from collections.abc import Iterable

from nerine.errors import FormatError

__all__ = ["flatten", "split_key", "stems"]


def flatten(path: str) -> str:
    """A dotted layer path as one word."""
    return path.replace(".", "_")


def stems(paths: Iterable[str], prefix: str) -> dict[str, str]:
    """{name in the file: layer path}.

    Raises:
        FormatError: two layers would get the same name.
    """
    found: dict[str, str] = {}
    for path in paths:
        stem = f"{prefix}_{flatten(path)}" if path else prefix
        if found.setdefault(stem, path) != path:
            raise FormatError(
                f"the layers {found[stem]} and {path} would both be called {stem} in a file; "
                "leave one of them out or rename it in the model"
            )
    return found


def split_key(key: str, suffixes: Iterable[str]) -> tuple[str, str] | None:
    """(stem, suffix) by the longest of the known `suffixes` that ends `key`, or None."""
    ends = [suffix for suffix in suffixes if key.endswith(f".{suffix}")]
    if not ends:
        return None
    suffix = max(ends, key=len)
    return key[: -len(suffix) - 1], suffix
