"""Whole runs on the little model: what they leave behind, and that one may stop and go on as if it had not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nerine
from nerine.errors import NerineError, OptionError, TargetError
from nerine.tiny import load_pipeline, style_set
from nerine.train.config import read_config, settings_of
from nerine.train.planning import plan_training
from nerine.train.running import TrainReport, train
from nerine.train.settings import TrainSettings
from nerine.train.watching import Watcher

pytestmark = pytest.mark.no_device_guard


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return style_set("neon").write(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one state a process, and these runs ask for different ones."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def settings(pictures: Path, out: Path, **more: Any) -> TrainSettings:
    common = {"data": (pictures,), "out": out, "rank": 2, "targets": ("attn-only",), "steps": 6, "batch_size": 2}
    return settings_of({**common, **more})


class StopsAt(Watcher):
    """Asks for the end after some steps, and remembers all that it hears."""

    def __init__(self, step: int = 10**9) -> None:
        self.step = step
        self.rows: list[Mapping[str, Any]] = []
        self.heard: list[tuple[str, int]] = []
        self.made = 0

    def begins(self, first: int, steps: int, said: str) -> None:
        self.made = first
        self.heard.append((said, first))

    def stepped(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)

    def validated(self, step: int, loss: float) -> None:
        self.heard.append(("validated", step))

    def sampled(self, step: int, files: list[Path]) -> None:
        self.heard.append(("sampled", step))

    def saved(self, step: int, folder: Path) -> None:
        self.heard.append(("saved", step))

    def stop(self) -> bool:
        self.made += 1
        return self.made >= self.step


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "memory")} for row in rows]


def state_of(out: Path) -> dict[str, Any]:
    last = sorted((out / "checkpoints").iterdir())[-1]
    found: dict[str, Any] = torch.load(last / "state.pt", weights_only=True)
    return {k: v for k, v in found.items() if k not in ("seconds", "settings")}


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else bool(one == two)


def test_a_run_leaves_what_the_page_says(pictures: Path, tmp_path: Path) -> None:
    watcher = StopsAt()
    out = tmp_path / "run"
    report = train(
        settings(
            pictures, out, prompts=("a handwritten seven, neon", "<b>"), sample_steps=2, validation_share=0.05, ema=0.9
        ),
        watcher=watcher,
    )
    assert isinstance(report, TrainReport)
    assert report.is_finished
    assert (report.steps, report.planned, report.pictures) == (6, 6, 200)
    names = {p.name for p in out.iterdir()}
    assert names >= {"adapter.safetensors", "adapter-ema.safetensors", "report.html", "history.jsonl", "settings.toml"}
    assert names >= {"data.json", "samples", "checkpoints", "cache", "loss.png"}
    assert sorted(p.name for p in (out / "samples").iterdir()) == [f"{n:06d}" for n in range(7)]
    assert sorted(p.name for p in (out / "samples" / "000006").iterdir()) == ["00.png", "01.png"]
    assert [row["step"] for row in watcher.rows] == [1, 2, 3, 4, 5, 6]
    assert ("validated", 0) in watcher.heard
    assert settings_of(read_config(out / "settings.toml")).adapter.rank == 2
    assert report.validation is not None
    assert report.validation_before is not None
    assert report.validation < report.validation_before
    assert json.loads(json.dumps(report.to_dict()))["is_finished"]
    assert "held-out loss" in str(report)
    assert "&lt;b&gt;" in (out / "report.html").read_text()


def test_what_was_trained_is_what_the_file_says(pictures: Path, tmp_path: Path) -> None:
    """The adapter in the file, on a fresh model, draws as the run's own last validation measured."""
    out = tmp_path / "run"
    train(settings(pictures, out, save_dtype="fp32"))
    state = state_of(out)["network"]
    network = nerine.load(load_pipeline(), out / "adapter.safetensors", strict=True)
    own = network.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], state[name]) for name in own)
    assert any(t.abs().max() > 0 for name, t in own.items() if name.endswith("up"))


@pytest.mark.parametrize(
    "more",
    [
        {"algo": "lokr", "dora": True, "dropout": 0.3, "rank_dropout": 0.2, "module_dropout": 0.1},
        {"algo": "dylora", "rank": 4, "ema": 0.8, "accumulate": 2, "caption_dropout": 0.5},
        {"algo": "tlora", "penalty": 0.1, "optimizer": "prodigy", "lr": 1.0},
        {"optimizer": "schedulefree-adamw", "lora_plus": 4.0, "max_norm": 0.5, "flip": True},
        {"text_encoder": True, "text_encoder_lr": 1e-3, "weighting": "min-snr", "timesteps": "shifted"},
    ],
    ids=["dropouts", "dylora", "tlora", "schedule-free", "text encoder"],
)
@pytest.mark.slow
def test_a_run_that_stops_goes_on_to_the_same_bits(pictures: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    common = {"validation_share": 0.03, "validate_every": 4, "save_every": 3, **more}
    train(settings(pictures, whole, **common))
    first = train(settings(pictures, again, **common), watcher=StopsAt(2))
    assert not first.is_finished
    assert first.steps == 2
    assert not (again / "adapter.safetensors").exists()
    second = train(settings(pictures, again, **common), resume=True, watcher=StopsAt(5))
    assert second.steps == 5
    last = train(settings(pictures, again, **common), resume=True)
    assert last.is_finished
    assert equal(state_of(whole), state_of(again))
    assert rows_of(whole) == rows_of(again)
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()


def test_torchs_generators_are_the_callers(pictures: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train(settings(pictures, tmp_path / "run", steps=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_seed_gives_the_same_run_and_another_does_not(pictures: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(name) + seed)
        train(settings(pictures, tmp_path / name, seed=seed, steps=2))
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")
    assert rows_of(tmp_path / "a") != rows_of(tmp_path / "c")


def test_a_run_can_start_from_an_adapter(pictures: Path, tmp_path: Path) -> None:
    train(settings(pictures, tmp_path / "a", save_dtype="fp32"))
    file = tmp_path / "a" / "adapter.safetensors"
    train(settings(pictures, tmp_path / "b", start_from=file, steps=1, lr=1e-9, save_dtype="fp32"))
    one, two = (nerine.load(load_pipeline(), tmp_path / n / "adapter.safetensors").state_dict() for n in "ab")
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_the_best_checkpoint_stays(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = {"lr": 0.5, "schedule": "constant", "validation_share": 0.05, "validate_every": 1, "keep": 1}
    train(settings(pictures, out, steps=8, **more))
    tried = [(row["validation"], row["step"]) for row in rows_of(out) if "validation" in row and row["step"]]
    kept = {int(p.name) for p in (out / "checkpoints").iterdir()}
    assert kept == {8, min(tried)[1]}


def test_a_second_run_needs_a_folder_of_its_own(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(settings(pictures, out, steps=1))
    with pytest.raises(OptionError, match="there is a run already"):
        train(settings(pictures, out, steps=1))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"rank": 3}, "rank was 2, now it is 3"),
        ({"lr": 1.0}, "lr was None, now it is 1.0"),
        ({"batch_size": 4}, "batch_size was 2, now it is 4"),
        ({"steps": 9}, "6 steps were planned, now 9"),
        ({"validation_share": 0.2}, "validation_share was 0.0, now it is 0.2"),
    ],
)
def test_another_run_does_not_go_on(pictures: Path, tmp_path: Path, more: dict[str, Any], words: str) -> None:
    out = tmp_path / "run"
    train(settings(pictures, out), watcher=StopsAt(2))
    before = sorted(p.name for p in (out / "checkpoints").iterdir())
    with pytest.raises(OptionError, match=words):
        train(settings(pictures, out, **more), resume=True)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == before
    assert settings_of(read_config(out / "settings.toml")).adapter.rank == 2


def test_what_does_not_change_the_numbers_may_change(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(settings(pictures, out), watcher=StopsAt(2))
    report = train(settings(pictures, out, save_every=1, keep=5, workers=0, prompts=("x",)), resume=True)
    assert report.is_finished


def test_a_loss_that_is_no_number_ends_the_run(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(NerineError, match="the loss of step 2 is nan: a lower lr"):
        train(settings(pictures, tmp_path / "run", lr=1e30, clip=0, warmup=0))


def test_mistakes_come_before_anything_is_written(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no setting 'factor'"):
        train(settings(pictures, tmp_path / "a", settings={"factor": 3}))
    with pytest.raises(TargetError):
        train(settings(pictures, tmp_path / "b", targets=("nothing-like-that",)))
    with pytest.raises(OptionError, match="shard: there is one process"):
        train(settings(pictures, tmp_path / "c", shard=True))
    assert not (tmp_path / "a" / "settings.toml").exists()
    assert not (tmp_path / "b" / "settings.toml").exists()


def test_epochs_count_pictures(pictures: Path, tmp_path: Path) -> None:
    plan = plan_training(settings(pictures, tmp_path / "run", steps=None, epochs=3, batch_size=8, accumulate=2))
    assert plan.steps == 38  # 3 epochs of 25 batches, two of them a step
    assert plan.layers > 10
    assert plan.seconds_per_step > 0
    assert plan.adapter_bytes == 16 * plan.params + 4 * 2 * plan.layers  # values, gradients, two moments, counts
    assert not (tmp_path / "run" / "history.jsonl").exists()
    assert "each picture 3.0 times" in str(plan)
    assert json.dumps(plan.to_dict())


def test_trackers_get_the_numbers(pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    train(settings(pictures, out, trackers=("tensorboard",), validation_share=0.05, steps=2))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {p.parent for p in out.rglob("events.out.*") if p.parent.name == "nerine"}
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"loss", "lr", "validation"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("loss")] == [1, 2]


def test_validation_moves_only_with_the_adapters(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    chosen = settings(pictures, out, validation_share=0.05, validate_every=1, steps=3, text_encoder=False)
    chosen = replace(chosen, optimizer=replace(chosen.optimizer, lr=1e-30))
    train(chosen)
    found = {row["validation"] for row in rows_of(out) if "validation" in row}
    assert len(found) == 1
