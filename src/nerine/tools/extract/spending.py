"""The bytes of a file spent on its layers: the tensors cost what they cost, and so does the header that names them."""

from __future__ import annotations

from collections.abc import Mapping

from nerine.errors import OptionError
from nerine.files.checkpoint import Layer
from nerine.tools.budget import spread
from nerine.tools.extract.choice import Choice
from nerine.tools.extract.options import Catalogue
from nerine.tools.extract.sheet import Sheet, sketched

__all__ = ["spend"]

ROUNDS = 8
CLOSE = 256  # bytes that are not worth another round


def spend(
    catalogues: Mapping[str, Catalogue], choice: Choice, sheet: Sheet, fixed: Mapping[str, Layer], size: int
) -> dict[str, int]:
    """Which option each layer gets, so that the file has at most `size` bytes with the layers that it has anyway.

    What a layer costs is known but for a few digits; the whole is laid out, and what it is off by is taken off or put
    on, until it fits and nothing much is left.

    Raises:
        OptionError: the file is larger without any of them.
    """
    empty = sheet.lay_out(fixed).bytes
    if empty > size:
        raise OptionError(f"extract: a file of {size:,} bytes is wanted, and its header and norms alone take {empty:,}")
    options = [catalogue.options for catalogue in catalogues.values()]
    best, best_error = [0] * len(options), sum(o[0].error for o in options)
    allowed = size - empty
    for _ in range(ROUNDS):
        chosen = spread(options, max(allowed, 0))
        over = _bytes(dict(zip(catalogues, chosen, strict=True)), catalogues, choice, sheet, fixed) - size
        error = sum(o[i].error for o, i in zip(options, chosen, strict=True))
        if over <= 0 and error < best_error:
            best, best_error = chosen, error
        if -CLOSE <= over <= 0 or allowed <= 0:
            break
        allowed -= over
    return dict(zip(catalogues, best, strict=True))


def _bytes(
    picked: Mapping[str, int],
    catalogues: Mapping[str, Catalogue],
    choice: Choice,
    sheet: Sheet,
    fixed: Mapping[str, Layer],
) -> int:
    """The size of the file with these options."""
    layers = dict(fixed)
    for path, option in picked.items():
        algorithm = catalogues[path].algorithm(option)
        if algorithm is not None:
            layers[path] = sketched(algorithm, choice.pairs[path].site, sheet.dtype)
    return sheet.lay_out({path: layers[path] for path in choice.algorithms if path in layers}).bytes
