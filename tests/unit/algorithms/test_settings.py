"""Settings: unknown names and bad values are refused at once, with the nearest name or what would be allowed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from nerine import DoRA, LoHa, LoKr, LoRA, OptionError
from nerine.algorithms import REGISTRY, build
from nerine.site import Site

UNKNOWN = [
    (LoRA, "ranks", "'rank'"),
    (LoRA, "rnak", "'rank'"),
    (LoRA, "dora_wd", "Known: alpha, "),
    (LoRA, "network_dim", "Known"),
    (LoHa, "tuker", "'tucker'"),
    (LoKr, "decompose_booth", "'decompose_both'"),
    (LoKr, "unbalanced_factorization", "Known|unbalanced"),
    (DoRA, "axes", "'axis'"),
]


@pytest.mark.parametrize(("kind", "setting", "hint"), UNKNOWN)
def test_an_unknown_setting_is_refused_with_the_nearest(kind: Any, setting: str, hint: str) -> None:
    args = (LoRA(),) if kind is DoRA else ()
    with pytest.raises(OptionError, match=rf"{kind.__name__} has no setting '{setting}'. .*({hint})"):
        kind(*args, **{setting: 1})
    with pytest.raises(TypeError):
        kind(*args, **{setting: 1})


BAD = [
    ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
    ({"rank": -3}, "rank"),
    ({"rank": 2.0}, r"rank must be a whole number of at least 1, got 2.0 \(float\)"),
    ({"rank": "8"}, r"got '8' \(str\)"),
    ({"rank": True}, r"got True \(bool\)"),
    ({"rank": None}, "rank"),
    ({"alpha": 0}, "alpha must be a positive number or None .* set its strength to 0"),
    ({"alpha": -1.0}, "alpha"),
    ({"alpha": math.inf}, "alpha"),
    ({"alpha": math.nan}, "alpha"),
    ({"alpha": "1"}, "alpha"),
    ({"alpha": True}, "alpha"),
    ({"tucker": "False"}, r"tucker must be True or False, got 'False' \(str\)"),
    ({"scalar": 1}, "scalar must be True or False"),
    ({"rs": None}, "rs must be True or False"),
    ({"bias": 0}, "bias must be True or False"),
    ({"on_input": "True"}, "on_input must be True or False"),
    ({"rescale": 1.0}, "rescale must be True or False"),
    ({"block_size": 0}, "block_size must be a whole number of at least 1, got 0"),
    ({"block_size": "32"}, "block_size"),
    ({"constraint": -0.1}, "constraint must be a number of at least 0"),
    ({"constraint": math.nan}, "constraint"),
    ({"stages": 0}, "stages must be a whole number"),
    ({"terms": 3}, r"terms must be 0 \(exact\) or a whole number from 4 to 100, got 3"),
    ({"min_rank": 17}, "min_rank must be at most the rank 16, got 17"),
    ({"timesteps": 0}, "timesteps"),
    ({"power": "2"}, "power must be a number"),
    ({"init": "pisa"}, "init must be one of .*, got 'pisa'"),
]
REFUSED = [
    (kind, settings, words)
    for kind in REGISTRY.values()
    for settings, words in BAD
    if settings.keys() <= {f.name for f in dataclasses.fields(kind)}
]


def test_every_bad_value_is_tried() -> None:
    assert {str(s) for s, _ in BAD} == {str(s) for _, s, _ in REFUSED}


def test_what_does_not_go_with_a_start_on_the_weight() -> None:
    with pytest.raises(OptionError, match="init='pissa' has no Tucker form"):
        LoRA(init="pissa", tucker=True)
    with pytest.raises(OptionError, match="init='olora' starts at no change by itself"):
        LoRA(init="olora", scalar=True)


@pytest.mark.parametrize(("kind", "settings", "words"), REFUSED, ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_bad_value_is_refused(kind: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=f"{kind.__name__}.*{words}"):
        kind(**settings)


@pytest.mark.parametrize("factor", [0, -2, 1.5, "8", True])
def test_a_bad_factor_is_refused(factor: Any) -> None:
    with pytest.raises(OptionError, match="LoKr: factor must be -1"):
        LoKr(factor=factor)


@pytest.mark.parametrize("flag", ["decompose_both", "full_matrix", "unbalanced"])
def test_a_string_is_no_flag(flag: str) -> None:
    with pytest.raises(OptionError, match=f"{flag} must be True or False, got 'False'"):
        LoKr(**{flag: "False"})


@pytest.mark.parametrize("inner", [None, "lora", LoRA, DoRA(LoRA())])
def test_dora_goes_around_an_algorithm(inner: Any) -> None:
    with pytest.raises(OptionError, match="DoRA goes around another algorithm"):
        DoRA(inner)


def test_dora_axis() -> None:
    with pytest.raises(OptionError, match="axis must be one of 'out', 'in', got 'output'"):
        DoRA(LoRA(), axis="output")
    with pytest.raises(OptionError, match="detach_norm"):
        DoRA(LoRA(), detach_norm=1)


def test_settings_are_given_by_name() -> None:
    with pytest.raises(OptionError, match=r"LoRA: settings are given by name, as in LoRA\(rank=\.\.\.\); got 8"):
        LoRA(8)
    with pytest.raises(OptionError, match=r"DoRA: settings are given by name, as in DoRA\(inner, axis=\.\.\.\)"):
        DoRA(LoRA(), "in")


@pytest.mark.parametrize(
    "algorithm",
    [
        LoRA(rank=3, alpha=1.0),
        LoHa(tucker=True),
        LoKr(factor=4, rs=True),
        DoRA(LoKr(rank=2), axis="in", detach_norm=True),
    ],
    ids=str,
)
def test_settings_rebuild_the_algorithm(algorithm: Any) -> None:
    assert build(algorithm.settings()) == algorithm
    assert hash(build(algorithm.settings())) == hash(algorithm)


def test_building_what_does_not_exist() -> None:
    with pytest.raises(OptionError, match=r"no algorithm is called 'lokar'\. Did you mean 'lokr'"):
        build({"algorithm": "lokar"})
    with pytest.raises(OptionError, match="no algorithm is called ''"):
        build({})
    with pytest.raises(OptionError, match="has no setting"):
        build({"algorithm": "lora", "dim": 4})


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        LoRA().rank = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("rank", "alpha", "rs", "scale"), [(4, None, False, 1), (4, 2.0, False, 0.5), (4, 2, True, 1), (4, None, True, 2)]
)
def test_scale(rank: int, alpha: float | None, rs: bool, scale: float) -> None:
    site = Site("linear", (12, 20))
    assert LoRA(rank=rank, alpha=alpha, rs=rs).design(site).scale == scale
    assert LoHa(rank=rank, alpha=alpha, rs=rs).design(site).scale == scale


def test_a_kronecker_product_of_full_factors_has_no_scale() -> None:
    design = LoKr(rank=16, alpha=4.0).design(Site("linear", (12, 20)))
    assert design.scale == 1
    assert "alpha has no effect" in design.note
