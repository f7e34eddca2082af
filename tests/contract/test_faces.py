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


NO_FIT = {  # algorithm -> what it advises instead
    "tlora": "extract as LoRA instead",
    "boft": "extract as DiagOFT, which has one, or as LoRA instead",
    "oft-v2": "extract as DiagOFT, which turns the outputs, or as LoRA instead",
}


def is_fitted(algorithm: Algorithm) -> bool:
    """A LoRA on the weight itself is fitted as a plain one, of half the rank that its deviation has."""
    inner: Algorithm = getattr(algorithm, "inner", algorithm)
    on_weight = getattr(inner, "init", "kaiming") in ("pissa", "olora")
    has_core = getattr(inner, "tucker", False) and inner.name != "lora"
    return inner.name not in NO_FIT and not has_core and not on_weight


def by_iteration(algorithm: Algorithm) -> bool:
    """Whether the fit comes near to the best, but only by and by."""
    return algorithm.name in ("loha", "glora", "dora") or getattr(algorithm, "rescale", False)


FITTED = [a for a in ALGORITHMS if is_fitted(a)]


@pytest.mark.parametrize("algorithm", [a for a in FITTED if not by_iteration(a)], ids=str)
def test_fit_recovers(algorithm: Algorithm) -> None:
    for place in places_of(algorithm):
        check_fit(algorithm, place)


@pytest.mark.parametrize("algorithm", [a for a in FITTED if by_iteration(a)], ids=str)
def test_fit_comes_near(algorithm: Algorithm) -> None:
    """Tiny layers and changes as large as the weight are the hardest case, most of all where lengths are apart."""
    left = [check_fit(algorithm, place, 0.6) for place in places_of(algorithm)]
    assert sum(left) / len(left) < (0.2 if algorithm.name == "dora" else 0.05)


@pytest.mark.parametrize("name", sorted(NO_FIT))
def test_what_is_not_fitted_says_what_to_do(name: str) -> None:
    algorithm = REGISTRY[name]()
    place = places_of(algorithm)[0]
    with pytest.raises(OptionError, match=f"cannot be fitted to a given weight, .*; {NO_FIT[name]}"):
        check_fit(algorithm, place)


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_a_tucker_core_is_not_fitted(name: str) -> None:
    algorithm = REGISTRY[name](rank=1, tucker=True)
    (place,) = (p for p in FEW if p.name == "conv2d strided")
    with pytest.raises(OptionError, match="a Tucker core is not fitted; leave tucker out"):
        check_fit(algorithm, place)


def test_dora_is_fitted_by_its_magnitudes() -> None:
    for algorithm in (DoRA(Full()), DoRA(Full(), axis="in")):
        for place in places_of(algorithm, FEW):
            check_fit(algorithm, place)
