"""The contracts that every algorithm keeps, for who writes one: `check_algorithm(MyAlgorithm(...))`."""

from __future__ import annotations

from nerine.testing.battery import check_algorithm
from nerine.testing.places import FEW, PLACES, Place

__all__ = ["FEW", "PLACES", "Place", "check_algorithm"]
