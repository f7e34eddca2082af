"""Every algorithm of the registry is in the battery, with variants that reach each of its layouts and options."""

from __future__ import annotations

import dataclasses

import pytest

from contract.cases import FEW, PLACES, SETTINGS
from nerine.algorithms import REGISTRY
from nerine.model.layer import site_of


def test_every_algorithm_has_cases() -> None:
    assert SETTINGS.keys() == REGISTRY.keys(), "a new algorithm needs an entry in SETTINGS, and only that"
    assert len(FEW) == 4


@pytest.mark.parametrize("name", REGISTRY)
def test_cases_reach_every_layout(name: str) -> None:
    kind = REGISTRY[name]
    sites = [site_of(place.make()) for place in PLACES]
    reached = {frozenset(kind(**s).design(site).layout.specs) for s in SETTINGS[name] for site in sites}
    assert reached == {frozenset(layout.specs) for layout in kind().layouts}


@pytest.mark.parametrize("name", REGISTRY)
def test_cases_set_every_option(name: str) -> None:
    fields = dataclasses.fields(REGISTRY[name])
    assert {f.name for f in fields} == {key for settings in SETTINGS[name] for key in settings}


@pytest.mark.parametrize("name", REGISTRY)
def test_alpha_is_not_the_rank(name: str) -> None:
    scales = [REGISTRY[name](**s).design(site_of(place.make())).scale for s in SETTINGS[name] for place in PLACES]
    assert sum(scale != 1 for scale in scales) > len(scales) / 2
