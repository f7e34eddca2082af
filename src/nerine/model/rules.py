"""Rule: what the layers that match get, the unit in which a choice of adapters is written down in code or in a file."""

from __future__ import annotations

from dataclasses import dataclass

from nerine.algorithms import Algorithm
from nerine.errors import OptionError
from nerine.model.adapter import check_strength
from nerine.model.patterns import Match

__all__ = ["Rule"]


@dataclass(frozen=True)
class Rule:
    """What the layers that `match` get; the first rule that matches a layer wins, and `algorithm=None` skips it.

    `match` is a pattern (see `nerine.model.patterns`), a preset, a class, or a predicate of path and module. A
    parameter that stands alone (the experts of a mixture, say) is matched by a pattern that ends in its name. `lr` is
    their own learning rate for `Network.param_groups`, `strength` what they start with. With `rows=(start, stop)` the
    adapter acts on those outputs alone, as on the queries of a fused projection; several such may match one layer.
    """

    match: Match
    algorithm: Algorithm | None
    lr: float | None = None
    strength: float = 1.0
    rows: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if isinstance(self.match, str) and self.match.startswith("!"):
            raise OptionError(
                f"Rule: {self.match!r} leaves out, which only targets can say; here that is "
                f'Rule("{self.match[1:]}", None) before the other rules'
            )
        if self.algorithm is not None and not isinstance(self.algorithm, Algorithm):
            raise OptionError(
                f"Rule: expected an algorithm such as LoRA(rank=16), or None to skip, got {self.algorithm!r}"
            )
        if self.lr is not None and (isinstance(self.lr, bool) or not isinstance(self.lr, int | float) or self.lr < 0):
            raise OptionError(f"Rule: lr must be a number of at least 0, got {self.lr!r}")
        if self.rows is not None and (
            not isinstance(self.rows, tuple)
            or len(self.rows) != 2
            or not all(isinstance(row, int) for row in self.rows)
            or not 0 <= self.rows[0] < self.rows[1]
        ):
            raise OptionError(f"Rule: rows must be (start, stop) with 0 <= start < stop, got {self.rows!r}")
