"""The change of a layer in its smallest form says the same as the dense matrix that it stands for."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nerine import BOFT, IA3, DiagOFT, DoRA, DyLoRA, Full, GLoRA, LoHa, LoKr, LoRA, OFTv2, TLoRA
from nerine.algorithms import Algorithm, Params
from nerine.files.checkpoint import Record
from nerine.site import Site
from nerine.tools.change import Change, Dense, Kron, UpDown, change_of, experts_of, inner, turn_size

LINEAR, WIDE = Site("linear", (24, 36)), Site("linear", (36, 24))
CONV = Site("conv", (24, 12, 3, 3), (1, 1), (1, 1), (1, 1))
BY_ITSELF: dict[str, Algorithm] = {
    "lora": LoRA(rank=4, alpha=3),
    "lora above its layer": LoRA(rank=40, alpha=3),
    "tucker": LoRA(rank=4, alpha=3, tucker=True),
    "dylora": DyLoRA(rank=4, alpha=3),
    "tlora": TLoRA(rank=4, alpha=3),
    "loha": LoHa(rank=2, alpha=3),
    "loha of a high rank": LoHa(rank=8, alpha=3),
    "loha, tucker": LoHa(rank=2, alpha=3, tucker=True),
    "lokr, full": LoKr(rank=4, full_matrix=True),
    "lokr": LoKr(rank=1, alpha=3),
    "lokr, both": LoKr(rank=1, alpha=3, decompose_both=True),
    "lokr, tucker": LoKr(rank=1, alpha=3, tucker=True),
    "full": Full(),
}
WITH_BASE: dict[str, Algorithm] = {
    "glora": GLoRA(rank=3, alpha=2),
    "dora": DoRA(LoRA(rank=4, alpha=3)),
    "dora in": DoRA(LoKr(rank=1, alpha=3), axis="in"),
    "oft": DiagOFT(block_size=4, rescale=True),
    "boft": BOFT(block_size=6),
    "oft-v2": OFTv2(block_size=4),
    "ia3": IA3(),
    "ia3 in": IA3(on_input=True),
}


def record_of(algorithm: Algorithm, site: Site, seed: int = 0) -> Record:
    """Such an adapter with values that no initialisation has."""
    design = algorithm.design(site)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: 0.3 * torch.randn(shape, generator=generator) + (name == "magnitude")
        for name, shape in design.shapes.items()
    }
    return Record(algorithm, site, Params(tensors, design.scale))


def weight_of(site: Site) -> Tensor:
    return torch.randn(site.shape, generator=torch.Generator().manual_seed(9))


def exact(record: Record, weight: Tensor) -> Tensor:
    """The change as the algorithm itself defines it, in fp64."""
    params = record.params.filled(t.double() for t in record.params.tensors.values())
    return record.algorithm.weight_deviation(params, weight.double()).flatten(1)


def check(change: Change, wanted: Tensor) -> None:
    norm = float(wanted.norm())
    assert change.shape == tuple(wanted.shape)
    torch.testing.assert_close(change.dense(), wanted, rtol=0, atol=1e-6 * norm)
    values = torch.linalg.svdvals(wanted)
    squares = change.squares
    assert change.norm == pytest.approx(norm, rel=1e-6)
    torch.testing.assert_close(squares.sqrt()[: len(values)], values[: len(squares)], rtol=0, atol=2e-6 * norm)
    assert float(values[len(squares) :].sum()) < 1e-5 * norm
    found = change.leading(3)
    kept = found.outputs * found.values @ found.inputs.mT
    for side in (found.outputs, found.inputs):
        torch.testing.assert_close(side.mT @ side, torch.eye(side.shape[1]).double(), rtol=0, atol=1e-6)
    missing = float(values[3:].square().sum()) ** 0.5
    assert float((wanted - kept).norm()) == pytest.approx(missing, rel=1e-5, abs=1e-5 * norm)
    right = torch.randn(wanted.shape[1], 2, generator=torch.Generator().manual_seed(4)).double()
    torch.testing.assert_close(change.times(right), wanted @ right, rtol=0, atol=1e-5 * norm)


@pytest.mark.parametrize("site", [LINEAR, WIDE, CONV], ids=["linear", "wide", "conv"])
@pytest.mark.parametrize("name", BY_ITSELF)
def test_a_change_that_needs_no_weight(name: str, site: Site) -> None:
    record = record_of(BY_ITSELF[name], site)
    seen = change_of(record)
    assert seen.lacking == ""
    assert seen.change is not None
    check(seen.change, exact(record, weight_of(site)))


@pytest.mark.parametrize("site", [LINEAR, WIDE, CONV], ids=["linear", "wide", "conv"])
@pytest.mark.parametrize("name", WITH_BASE)
def test_a_change_that_depends_on_the_weight(name: str, site: Site) -> None:
    record, weight = record_of(WITH_BASE[name], site), weight_of(site)
    assert change_of(record).lacking
    seen = change_of(record, weight)
    assert seen.lacking == ""
    assert seen.change is not None
    check(seen.change, exact(record, weight))


def test_the_form_is_the_smallest() -> None:
    forms = {name: type(change_of(record_of(algorithm, LINEAR)).change) for name, algorithm in BY_ITSELF.items()}
    assert forms["lora"] is forms["dylora"] is forms["tlora"] is forms["loha"] is UpDown
    assert forms["lokr"] is forms["lokr, both"] is Kron
    assert forms["lora above its layer"] is forms["loha of a high rank"] is forms["full"] is Dense


PAIRS = list(itertools.product(("lora", "loha", "lokr", "lokr, full", "full"), repeat=2))


@pytest.mark.parametrize("pair", PAIRS)
def test_products_through_factors(pair: tuple[str, str]) -> None:
    records = [record_of(BY_ITSELF[name], CONV, seed) for seed, name in enumerate(pair)]
    a, b = (change_of(record).change for record in records)
    assert a is not None
    assert b is not None
    weight = weight_of(CONV)
    wanted = float((exact(records[0], weight) * exact(records[1], weight)).sum())
    assert inner(a, b) == pytest.approx(wanted, rel=1e-6, abs=1e-6 * a.norm * b.norm)


def test_nothing_of_the_size_of_the_layer_is_built() -> None:
    """Dense, each of these would be 120 GB."""
    size, rank = 120_000, 4
    generator = torch.Generator().manual_seed(0)
    a, b = (
        UpDown(torch.randn(size, rank, generator=generator), torch.randn(rank, size, generator=generator)) for _ in "ab"
    )
    k = Kron(torch.randn(300, 400, generator=generator), torch.randn(400, 300, generator=generator))
    begin = time.monotonic()
    assert a.norm == pytest.approx(size * math.sqrt(rank), rel=0.02)
    assert abs(inner(a, b)) < 0.01 * a.norm * b.norm
    assert abs(inner(a, k)) < 0.01 * a.norm * k.norm
    assert k.leading(4).outputs.shape == a.leading(4).outputs.shape == (size, 4)
    assert time.monotonic() - begin < 60


def test_directions_below_rounding_are_none() -> None:
    up, down = torch.randn(30, 1), torch.randn(1, 20)
    change = UpDown(up.expand(30, 6).contiguous(), down.expand(6, 20).contiguous())
    assert change.rank == change.leading(4).values.numel() == 1
    assert UpDown(torch.zeros(30, 2), torch.randn(2, 20)).rank == 0
    assert UpDown(torch.zeros(30, 2), torch.randn(2, 20)).leading(4).outputs.shape == (30, 0)


@pytest.mark.parametrize("name", ["oft", "boft", "oft-v2", "ia3", "ia3 in"])
def test_the_size_of_a_turn_is_that_of_the_identity_turned(name: str) -> None:
    site = Site("linear", (36, 24))
    record = record_of(WITH_BASE[name], site)
    on_inputs = name in ("oft-v2", "ia3 in")
    count = 24 if on_inputs else 36
    own = replace(record, site=Site("linear", (count, count)))
    wanted = float(exact(own, torch.eye(count)).norm())
    assert wanted > 0.1
    assert turn_size(record) == pytest.approx(wanted, rel=1e-5)


def test_experts_one_by_one() -> None:
    site = replace(LINEAR, experts=3)
    records = [record_of(LoRA(rank=4, alpha=3), LINEAR, seed) for seed in range(3)]
    tensors = {name: torch.stack([r.params.tensors[name] for r in records]) for name in records[0].params.tensors}
    whole = Record(records[0].algorithm, site, Params(tensors, records[0].params.scale))
    for one, own in zip(experts_of(whole), records, strict=True):
        found = change_of(one).change
        assert found is not None
        check(found, exact(own, weight_of(LINEAR)))
