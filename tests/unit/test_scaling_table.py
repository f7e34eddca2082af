"""The tables of docs/scaling.md are what the script makes of the recorded counts, and the counts are still right."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra: pip install nerine[train]")

ROOT = Path(__file__).parents[2]
NAMES = ("scaling_counts", "scaling_pipeline", "scaling_memory", "scaling_check", "scaling")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of diffusers


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the benchmark, by their names without `scaling_`."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return SimpleNamespace(**{name.removeprefix("scaling_"): importlib.import_module(name) for name in NAMES})


def test_the_document_shows_what_the_script_computes(scripts: Any) -> None:
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert scripts.scaling.document(text, scripts.scaling.tables(scripts.scaling.recorded())) == text


def test_every_algorithm_has_a_row(scripts: Any) -> None:
    from nerine.algorithms import REGISTRY

    plain = {kind.__name__ for kind in REGISTRY.values()}
    assert set(scripts.memory.ALGORITHMS) == plain | {"DoRA(LoRA)", "DoRA(LoKr)", "DoRA(LoHa)"}
    assert set(scripts.scaling.recorded()["counts"]) == {*scripts.scaling.ROWS, scripts.memory.FROZEN}


def test_the_recorded_counts_are_what_was_measured_and_what_the_formula_says(scripts: Any) -> None:
    record = scripts.scaling.recorded()
    assert set(record["check"]) == set(scripts.scaling.ROWS)
    for name, found in record["check"].items():
        assert found["counted"] == pytest.approx(found["measured"], rel=5.5e-4), name
    for name, keeps in scripts.memory.KEEPS.items():
        one = scripts.scaling.jobs(record)[name]
        assert 0.982 < one.blocks_by_formula(keeps) / one.blocks_kept < 0.998, name


@pytest.mark.no_device_guard
def test_a_count_is_what_a_cpu_keeps(scripts: Any) -> None:
    shape = scripts.counts.Shape(heads=2, head=32, double=1, single=2, image=96, text=32, context=64)
    measured, counted = (scripts.check.kept_of_blocks("DoRA(LoRA)", shape, device) for device in ("cpu", "meta"))
    assert counted == pytest.approx(measured, rel=2e-3)


@pytest.mark.no_device_guard
def test_a_new_count_is_the_recorded_one(scripts: Any) -> None:
    """Fails when an algorithm keeps or computes something else: then run `benchmarks/scaling.py --count --write`."""
    recorded = scripts.scaling.jobs(scripts.scaling.recorded())["LoRA"].counts
    found = scripts.counts.per_block(scripts.counts.Shape(), scripts.memory.adapt("LoRA"))
    for part in ("double", "single"):
        assert found[part].kept == pytest.approx(recorded[part].kept, rel=0.01)
        for one in ("forward", "backward"):
            assert getattr(found[part], one).flops == pytest.approx(getattr(recorded[part], one).flops, rel=0.01)


def test_flops_are_those_of_the_shapes(scripts: Any) -> None:
    """2 for each weight that a token passes, and 4·n²·width of attention; the frozen backward has no weights' share."""
    n, width = 4608, 3072
    frozen = scripts.scaling.jobs(scripts.scaling.recorded())[scripts.memory.FROZEN].counts
    for part, layers in (("double", 12), ("single", 5 + 7)):  # of width², each for all tokens: 4 + 8, and 3 + 4 + 5
        assert frozen[part].forward.flops == pytest.approx(2 * n * layers * width**2 + 4 * n**2 * width, rel=1e-3)
        assert frozen[part].backward.flops == pytest.approx(2 * n * layers * width**2 + 10 * n**2 * width, rel=1e-3)


def test_weights_are_those_of_the_formats(scripts: Any) -> None:
    size = scripts.memory.Size(base=1000, linear=800, rows=10)
    assert size.weights("bf16") == 2000
    assert size.weights("fp8") == 400 + 800 + 40
    assert size.weights("nf4") == pytest.approx(400 + 400 + 800 / 64 + 4 * 800 / 64 / 256)


def test_what_waits_for_what(scripts: Any) -> None:
    task, run = scripts.pipeline.Task, scripts.pipeline.run
    found = run(
        [
            task("load", "network", 2.0),
            task("work", "compute", 3.0, after=("load",)),
            task("load more", "network", 4.0, begun=("work",)),
            task("work more", "compute", 1.0, after=("load more",)),
        ]
    )
    assert found == {"load": (0, 2), "work": (2, 5), "load more": (2, 6), "work more": (6, 7)}
    with pytest.raises(ValueError, match="wait for each other"):
        run([task("one", "compute", 1.0, after=("two",)), task("two", "compute", 1.0)])


def test_engines_hide_what_they_can(scripts: Any) -> None:
    pipeline = scripts.pipeline
    blocks = [pipeline.Block(forward=1.0, backward=2.0, weights=10.0, gradients=1.0)] * 4
    fast = pipeline.Machine(link=1e9, nic=1e9, hop=0.0)
    slow = pipeline.Machine(link=2.0, nic=2.0, hop=0.0)
    for engine in (pipeline.ddp, pipeline.fsdp):
        assert engine(blocks, fast, 8, 0.0).seconds == pytest.approx(12.0, abs=1e-6)
    # two passes of four gathers of 10 · 7/8 / 2 seconds, and gradients of 1 · 7/8 / 2; the first block's last
    slowest = pipeline.fsdp(blocks, slow, 8, 0.0)
    assert slowest.seconds > 8 * 4.375
    assert slowest.exposed == pytest.approx(slowest.seconds - 12.0)
    # all gradients in one bucket after the backward: an all-reduce is two passes around the ring
    assert pipeline.ddp(blocks, slow, 8, 0.5).exposed == pytest.approx(2 * 4 * 7 / 8 / 2)
    # shares within nodes that are slow to each other
    apart = pipeline.Machine(link=1e9, nic=0.01, hop=0.0)
    assert pipeline.fsdp(blocks, apart, 16, 0.0, hybrid=True).seconds < pipeline.fsdp(blocks, apart, 16, 0.0).seconds
