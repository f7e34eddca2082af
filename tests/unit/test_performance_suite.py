"""The performance suite: what it makes of measured figures, how it shares its time, and when its gate closes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
NAMES = (
    *("step_measure", "step_rows", "step_contestants", "suite_cases", "suite_gate", "suite_pages", "suite"),
    "overhead",
)
pytestmark = pytest.mark.no_device_guard


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})


# -- pages ---------------------------------------------------------------------------------------------------------
def figure(contestant: str, ratio: float | None, **more: Any) -> dict[str, Any]:
    given = {"layer": "linear-3072", "precision": "fp32", "mode": "eager", "row": "LoRA", "contestant": contestant}
    return given | {"ratio": ratio, "rounds": 12} | more


def recorded() -> dict[str, Any]:
    mine = {
        "goal": 1.05,
        "reached": False,
        "eval_ratio": 1.31,
        "eval_reached": False,
        "floor": 1.03,
        "over_floor": 0.05,
    }
    overhead = {
        "width": 0.05,
        "layer": [
            {"row": "LoRA", "contestant": "nerine", "step_us": 81.4, "eval_us": 20.2}
            | {"step_multiple": 1.62, "eval_multiple": 1.51}
        ],
        "model": [
            {"row": "LoRA", "layers": 794, "frozen_ms": 100.0, "adapted_ms": 200.0, "layers_ms": 90.0, "lost": 0.05}
            | {"reached": False, "peers_ms": {"PEFT": 250.0}}
        ],
    }
    return {
        "header": {"cpu": "a made-up one", "load before": "0.10 0.20 0.30"},
        "figures": [
            figure("nerine", 1.08, kept_reached=True, **mine),
            figure("by hand", 1.06, rounds=4),
            figure("LyCORIS", 2.12),
            figure("LyCORIS bypass", 1.21),
            figure("PEFT", None, rounds=0, note="fails: ImportError: gone"),
            figure("frozen again", 0.99),
        ],
        "overhead": overhead,
    }


def test_the_page_shows_the_figures(scripts: Any) -> None:
    text = scripts.suite_pages.page(recorded())
    row = next(line for line in text.splitlines() if line.startswith("| LoRA ! |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:11] == [
        *("LoRA !", "1.05", "not reached", "**1.08**", "", "1.03", "+5%", "1.06", "2.12", "1.21", "fails *")
    ]
    assert "12 rounds; frozen again: 0.99" in text
    assert "cpu a made-up one, load before 0.10 0.20 0.30." in text
    assert "PEFT, LoRA: fails: ImportError: gone" in text
    assert "| LoRA | nerine | 81 | 1.6 | 20 | 1.5 |" in text
    assert "| LoRA | 100 | 200 | 90 | 5.0% | not reached | 250 |" in text


def test_a_goal_that_is_missed_is_said(scripts: Any) -> None:
    assert scripts.suite_pages.unreached(scripts.suite_pages._figures(recorded())) == [
        "linear-3072, fp32, eager, LoRA: step 1.08, goal 1.05 (floor 1.03)",
        "linear-3072, fp32, eager, LoRA: eval 1.31, goal 1.05",
    ]
    found = recorded()
    found["figures"][0] |= {"reached": True, "eval_reached": True, "kept_reached": True}
    assert "## Goals not reached\n\nNone." in scripts.suite_pages.page(found)


def test_the_best_mode_of_lycoris_is_one_that_computes_the_same(scripts: Any) -> None:
    figures = scripts.suite_pages._figures(recorded())
    group = {f.contestant: f for f in figures}
    assert scripts.suite_pages.lycoris_best(group) == 1.21
    group["LyCORIS bypass"].note = "another output"
    assert scripts.suite_pages.lycoris_best(group) == 2.12
    assert scripts.suite_pages.bar_values(group) == {"floor": 1.03, "nerine": 1.08, "LyCORIS": 2.12}


def test_the_picture_is_drawn(scripts: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra: pip install nerine[train]")
    scripts.suite_pages.draw(recorded(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_pages_are_those_of_the_recorded_figures(scripts: Any) -> None:
    results = ROOT / "benchmarks" / "results" / "performance.json"
    if not results.exists():
        pytest.skip("nothing is recorded yet: python benchmarks/suite.py")
    found = json.loads(results.read_text(encoding="utf-8"))
    for file, make in (
        (ROOT / "docs" / "performance.md", scripts.suite_pages.page),
        (results.with_suffix(".md"), scripts.suite_pages.everything),
    ):
        assert file.read_text(encoding="utf-8") == make(found), f"{file}: run python benchmarks/suite.py --pages"


# -- the gate ------------------------------------------------------------------------------------------------------
class Races:
    """Races whose ratios are made up: 1.1, but for some rows that are slow in the first so many races."""

    def __init__(self, slow: dict[tuple[str, str], tuple[float, int]]) -> None:
        self.slow, self.calls = dict(slow), []  # type: ignore[var-annotated]

    def __call__(self, layer: str, rows: tuple[str, ...], rounds: int) -> dict[str, float]:
        self.calls.append((layer, rows, rounds))
        found = {}
        for row in rows:
            ratio, times = self.slow.get((layer, row), (1.1, 1))
            found[row] = ratio if times > 0 else 1.1
            self.slow[layer, row] = ratio, times - 1
        return found


def gate_of(scripts: Any, slow: dict[tuple[str, str], tuple[float, int]]) -> tuple[bool, Races, list[str]]:
    gate = scripts.suite_gate
    races, said = Races(slow), []  # type: ignore[var-annotated]
    recorded = {layer: dict.fromkeys(gate.NAMES, 1.1) for layer in gate.LAYERS}
    return gate.gate(recorded, races, said.append), races, said


def test_the_gate_lets_pass_what_is_as_fast_or_a_little_slower(scripts: Any) -> None:
    passed, races, _ = gate_of(scripts, {("conv-320", "LoHa"): (1.1 * 1.24, 9)})
    assert passed
    assert [(layer, len(rows)) for layer, rows, _ in races.calls] == [("linear-1280", 5), ("conv-320", 5)]


def test_a_row_that_was_slow_once_is_raced_again_with_more_rounds(scripts: Any) -> None:
    passed, races, said = gate_of(scripts, {("linear-1280", "LoKr"): (2.0, 1)})
    assert passed
    assert races.calls[1] == ("linear-1280", ("LoKr",), scripts.suite_gate.MORE)
    assert races.calls[0][2] < scripts.suite_gate.MORE
    assert not any("worse" in line for line in said)


def test_a_row_that_stays_slow_closes_the_gate_and_is_named(scripts: Any) -> None:
    slow = {("linear-1280", "LoKr"): (2.0, 2), ("conv-320", "LoRA"): (1.5, 1)}
    passed, _, said = gate_of(scripts, slow)
    assert not passed
    assert said.count("linear-1280, LoKr: 2.00 of the frozen layer, recorded 1.10: 82% worse, allowed are 25%") == 1
    assert not any("worse" in line and "LoRA" in line for line in said)


def test_the_gate_records_its_ratios(scripts: Any, tmp_path: Path) -> None:
    file = tmp_path / "gate.json"
    scripts.suite_gate.record(Races({("conv-320", "LoHa"): (1.9, 9)}), file)
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["ratios"]["conv-320"]["LoHa"] == 1.9
    assert found["ratios"]["linear-1280"]["LoHa"] == 1.1
    assert "cpu" in found["header"]


# -- time and memory -----------------------------------------------------------------------------------------------
def test_rounds_are_as_many_as_the_time_allows(scripts: Any) -> None:
    plan = scripts.step_measure.plan_rounds
    assert plan(1.0, 1.0, 50.0) == (25, 1)
    assert plan(0.01, 0.01, 50.0) == (40, 1)
    assert plan(1.0, 2.0, 20.0) == (10, 2)  # ten rounds, five of them with the guests
    assert plan(1.0, 2.0, 5.0) == (10, 3)  # never fewer than ten, and four for the guests


def test_the_time_is_shared_among_what_is_still_to_come(scripts: Any) -> None:
    cases = [scripts.suite_cases.Case("linear-320", (), share=share) for share in (1.0, 3.0)]
    assert scripts.suite.budgets(cases, 0, 100.0, extra=1.0) == pytest.approx(20.0)
    assert scripts.suite.budgets(cases, 1, 60.0, extra=1.0) == pytest.approx(45.0)


def test_guests_take_part_in_fewer_rounds(scripts: Any) -> None:
    measure = scripts.step_measure
    seen: list[str] = []

    def act(_: Any, c: Any) -> tuple[float, float]:
        seen.append(c.name)
        return 1.0, 2.0

    group = [measure.Contestant("frozen"), measure.Contestant("peer", guest=True)]
    times = measure.race(None, {"LoRA": group}, 5, act, every=2, warm_up=1)["LoRA"]
    assert set(times["frozen"].total) == {0, 1, 2, 3, 4}
    assert set(times["peer"].total) == {0, 2, 4}
    assert seen.count("peer") == 4  # and in the round that is not counted
    assert measure.median_ratio({0: 3.0, 2: 9.0, 4: 5.0}, {0: 1.0, 1: 1.0, 2: 3.0, 3: 1.0, 4: 1.0}) == 3.0


def test_memory_of_a_step(scripts: Any) -> None:
    """A frozen layer keeps nothing; what squares its output keeps one of that size, and its peak is more."""
    rows, measure = scripts.step_rows, scripts.step_measure
    p = rows.problem_of(lambda: nn.Linear(24, 40), (16, 24))
    frozen = scripts.step_contestants.frozen(p)
    base = measure.memory(p, frozen, p.weight.numel())
    assert (base.kept, base.weight_sized, base.output_sized) == (16 * 24 * 4, 0, 0)
    assert base.peak == (16 * 40 + 16 * 24) * 4
    squares = measure.Contestant("squares", lambda x: frozen.forward(x) ** 2)
    found = measure.memory(p, squares, p.weight.numel())
    assert (found.kept - base.kept, found.weight_sized, found.output_sized) == (16 * 40 * 4, 0, 1)
    assert found.peak > base.peak
    dense = measure.Contestant("dense", lambda x: x @ (p.weight * torch.ones(40, 1)).T)
    assert measure.memory(p, dense, p.weight.numel()).weight_sized == 1


def test_a_case_is_measured(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"linear-320": (lambda: nn.Linear(64, 96), (40, 64))}
    monkeypatch.setattr(scripts.step_rows, "LAYERS", small)
    case = scripts.suite_cases.Case("linear-320", ("LoRA", "DoRA(LoKr)"), peers=False)
    figures = {(f.row, f.contestant): f for f in scripts.suite_cases.measure(case, 1.0, rounds=2)}
    assert set(figures) == {
        *(("LoRA", name) for name in ("nerine", "by hand", "frozen again")),
        *(("DoRA(LoKr)", name) for name in ("nerine", "by hand")),
    }
    mine = figures["DoRA(LoKr)", "nerine"]
    assert mine.rounds == 2
    assert not mine.note
    assert mine.error is not None
    assert mine.error < 1e-4
    assert None not in (mine.ratio, mine.eval_ratio, mine.median_ratio, mine.peak, mine.kept)
    assert mine.floor is not None
    assert mine.floor > 1
    assert mine.over_floor == pytest.approx(mine.ratio / mine.floor - 1)


def test_options_select_cases(scripts: Any) -> None:
    selected = scripts.suite_cases.selected
    assert [c.layer for c in selected(None, None, None, None)] == [c.layer for c in scripts.suite_cases.CASES]
    (one,) = selected(["linear-3072"], ["IA3"], ["bf16"], ["compiled"])
    assert (one.layer, one.rows, one.precision, one.mode) == ("linear-3072", ("IA3",), "bf16", "compiled")
    assert {c.rows for c in selected(None, ["LoRA"], None, None)} == {("LoRA",)}


def test_what_is_lost_between_layers(scripts: Any) -> None:
    assert scripts.overhead.lost_share(100.0, 200.0, 90.0) == pytest.approx(0.05)


def test_an_interruption_is_no_overhead(scripts: Any) -> None:
    times = iter([(1.0, 3.0), (50.0, 90.0), (2.0, 4.0)])
    assert scripts.overhead.repeated(lambda m, c: next(times), 3)(None, None) == (2.0, 4.0)
