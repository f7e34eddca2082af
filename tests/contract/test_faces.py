"""Train = merge: what the adapted layer computes is what the changed weight computes, and so are all gradients."""

from __future__ import annotations

import pytest

from contract.cases import ALGORITHMS, FEW, TINY, few, places_of
from nerine.algorithms import REGISTRY, Algorithm, DoRA, Full
from nerine.errors import OptionError
from nerine.testing.battery import check_faces, check_fit, check_gradients, check_output, check_row_norm

pytestmark = [
    pytest.mark.no_device_guard,  # one device only, and thousands of small operations
    pytest.mark.filterwarnings("ignore:Using padding='same'"),  # torch's, of the base layer
]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_faces(algorithm: Algorithm) -> None:
    for place in places_of(algorithm):
        check_faces(algorithm, place)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_output_is_base_and_deviation(algorithm: Algorithm) -> None:
    for place in few(algorithm):
        check_output(algorithm, place)


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if getattr(a, "axis", "") != "in"], ids=str)
def test_row_norm(algorithm: Algorithm) -> None:
    for place in places_of(algorithm):
        check_row_norm(algorithm, place)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_gradients_by_finite_differences(algorithm: Algorithm) -> None:
    for place in places_of(algorithm, TINY):
        check_gradients(algorithm, place)


NO_FIT = {"loha", "tlora", "glora", "boft", "oft-v2"}  # not in closed form


def is_fitted(algorithm: Algorithm) -> bool:
    options = (getattr(algorithm, name, False) for name in ("tucker", "rescale"))
    on_weight = getattr(algorithm, "init", "kaiming") in ("pissa", "olora")
    return algorithm.name not in (*NO_FIT, "dora") and not any(options) and not on_weight


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if is_fitted(a)], ids=str)
def test_fit_recovers(algorithm: Algorithm) -> None:
    for place in places_of(algorithm):
        check_fit(algorithm, place)


@pytest.mark.parametrize("name", sorted(NO_FIT))
def test_what_is_not_fitted_says_so(name: str) -> None:
    algorithm = REGISTRY[name]()
    place = places_of(algorithm)[0]
    with pytest.raises(OptionError, match="cannot be fitted to a given weight"):
        check_fit(algorithm, place)


def test_dora_is_fitted_by_its_magnitudes() -> None:
    for algorithm in (DoRA(Full()), DoRA(Full(), axis="in")):
        for place in places_of(algorithm, FEW):
            check_fit(algorithm, place)
