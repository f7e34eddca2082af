"""Layer names in files. Flattening a path ("a.b_c" -> "a_b_c") cannot be undone, so names are looked up, not parsed."""

from __future__ import annotations

from collections.abc import Iterable

from nerine.errors import FormatError

__all__ = ["aliases", "candidates", "families_of", "flatten", "split_key", "stems", "unflatten"]


def flatten(path: str) -> str:
    """A dotted layer path as one word."""
    return path.replace(".", "_")


def candidates(paths: Iterable[str], prefix: str) -> dict[str, list[str]]:
    """{name in a file: the layers that it may mean}; more than one where paths differ only in dots and underscores."""
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(f"{prefix}_{flatten(path)}" if path else prefix, []).append(path)
    return found


def stems(paths: Iterable[str], prefix: str) -> dict[str, str]:
    """{name in the file: layer path}.

    Raises:
        FormatError: two layers would get the same name.
    """
    found = candidates(paths, prefix)
    for stem, layers in found.items():
        if len(layers) > 1:
            raise FormatError(
                f"the layers {' and '.join(layers)} would both be called {stem} in a file; "
                "leave one of them out or rename it in the model"
            )
    return {stem: layers[0] for stem, layers in found.items()}


def split_key(key: str, suffixes: Iterable[str]) -> tuple[str, str] | None:
    """(stem, suffix) by the longest of the known `suffixes` that ends `key`, or None."""
    ends = [suffix for suffix in suffixes if key.endswith(f".{suffix}")]
    if not ends:
        return None
    suffix = max(ends, key=len)
    return key[: -len(suffix) - 1], suffix


def aliases(shapes):
    return {}


def families_of(shapes):
    return None


def unflatten(name):
    return None
