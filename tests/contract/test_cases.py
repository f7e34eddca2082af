"""Every algorithm of the registry is in the battery, with variants that reach each of its layouts and options."""

from __future__ import annotations

import dataclasses

import pytest

from contract.cases import FEW, SETTINGS, places_of
from nerine.algorithms import REGISTRY
from nerine.testing.places import site_at

# layouts that other programs write and nerine only reads
READ_ONLY = {"full": {frozenset({"diff_b"})}, "tlora": {frozenset({"q", "p", "lambda"})}}


def test_every_algorithm_has_cases() -> None:
    assert SETTINGS.keys() == REGISTRY.keys(), "a new algorithm needs an entry in SETTINGS, and only that"
    assert len(FEW) == 6


@pytest.mark.parametrize("name", REGISTRY)
def test_cases_reach_every_layout(name: str) -> None:
    kind = REGISTRY[name]
    variants = [kind(**s) for s in SETTINGS[name]]
    reached = {
        frozenset(variant.design(site_at(place)).layout.specs) for variant in variants for place in places_of(variant)
    }
    assert reached == {frozenset(layout.specs) for layout in kind().layouts} - READ_ONLY.get(name, set())


@pytest.mark.parametrize("name", REGISTRY)
def test_cases_set_every_option(name: str) -> None:
    fields = dataclasses.fields(REGISTRY[name])
    assert {f.name for f in fields} == {key for settings in SETTINGS[name] for key in settings}


@pytest.mark.parametrize("name", REGISTRY)
def test_alpha_is_not_the_rank(name: str) -> None:
    variants = [REGISTRY[name](**s) for s in SETTINGS[name]]
    designs = [variant.design(site_at(place)) for variant in variants for place in places_of(variant)]
    scales = [design.scale for design in designs if design.layout.alpha == "scale"]
    assert not scales or sum(scale != 1 for scale in scales) > len(scales) / 2
