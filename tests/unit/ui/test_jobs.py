"""Jobs beside the page: progress, cancelling, stopping, waiting; and what a cancelled tool leaves (nothing)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from nerine.algorithms import LoHa, LoRA
from nerine.errors import FormatError, OptionError
from nerine.tools.combine import combine
from nerine.tools.compare import compare
from nerine.tools.convert import convert
from nerine.tools.inspect import inspect
from nerine.tools.merge import merge
from nerine.tools.resize import resize
from nerine.ui.jobs import Cancelled, Job, Jobs
from tool_adapters import adapter_of, base_of

LONG = 20.0  # seconds that nothing here takes


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def jobs() -> Any:
    made = Jobs()
    yield made
    made.close()


def endless(job: Job) -> str:
    step = 0
    while not job.is_stopped():
        job.progress(step, 10**9, f"layer {step}")
        step += 1
        time.sleep(0.001)
    return f"stopped after {step > 0}"


def test_a_job_gives_its_result_and_says_how_far_it_is(jobs: Jobs) -> None:
    go = threading.Event()

    def work(job: Job) -> str:
        job.progress(3, 7, "block.ff")
        job.show("<p>so far</p>")
        assert go.wait(LONG)
        return "<b>done</b>"

    job = jobs.start("page", "convert", work)
    until(lambda: bool(job.state.shown))
    assert (job.state.done, job.state.total, job.state.what, job.state.shown) == (3, 7, "block.ff", "<p>so far</p>")
    assert job.is_running
    go.set()
    assert job.join(LONG)
    assert job.result == "<b>done</b>"
    assert job.error is None


def test_an_error_is_kept_and_the_next_job_runs(jobs: Jobs) -> None:
    def broken(job: Job) -> str:
        raise FormatError("half a file")

    job = jobs.start("page", "convert", broken)
    assert job.join(LONG)
    assert isinstance(job.error, FormatError)
    assert not job.was_cancelled
    again = jobs.start("page", "convert", lambda job: "fine")
    assert again.join(LONG)
    assert again.result == "fine"


def test_cancelling_ends_it_without_a_result_and_stopping_with_one(jobs: Jobs) -> None:
    job = jobs.start("page", "train", endless)
    until(lambda: job.state.done > 3)
    job.cancel()
    assert job.join(LONG)
    assert job.was_cancelled
    assert job.result == ""
    other = jobs.start("page", "train", endless)
    until(lambda: other.state.done > 3)
    other.stop()
    assert other.join(LONG)
    assert not other.was_cancelled
    assert other.result == "stopped after True"


def test_one_of_a_kind_runs_and_the_others_wait_and_can_be_cancelled(jobs: Jobs) -> None:
    first = jobs.start("one", "merge", endless)
    until(lambda: first.state.done > 0)
    second = jobs.start("two", "merge", endless)
    other_kind = jobs.start("two", "inspect", endless)
    until(lambda: other_kind.state.done > 0)
    until(lambda: second.state.waits)
    assert second.state.done == 0
    with pytest.raises(OptionError, match="running already"):
        jobs.start("one", "merge", endless)
    second.cancel()
    assert second.join(LONG)
    assert second.was_cancelled
    first.cancel()
    assert first.join(LONG)


def test_a_page_that_is_closed_takes_its_jobs_along_and_no_others(jobs: Jobs) -> None:
    gone, stays = jobs.start("gone", "merge", endless), jobs.start("stays", "convert", endless)
    jobs.leave("gone")
    assert gone.join(LONG)
    assert stays.is_running
    jobs.close()
    assert not stays.is_running
    with pytest.raises(OptionError, match="ending"):
        jobs.start("stays", "convert", endless)


# -- what a cancelled tool leaves --------------------------------------------------------------------------------------
TOOLS: dict[str, Callable[[Path, Path, Any], Any]] = {
    "convert": lambda f, out, p: convert(f / "loha.safetensors", out, to="full", force=True, progress=p),
    "dialect": lambda f, out, p: convert(f / "loha.safetensors", out, dialect="lycoris", force=True, progress=p),
    "resize": lambda f, out, p: resize(f / "lora.safetensors", out, rank=2, force=True, progress=p),
    "combine": lambda f, out, p: combine(
        [f / "lora.safetensors", f / "other.safetensors"], out, method="svd", rank=2, force=True, progress=p
    ),
    "merge": lambda f, out, p: merge(f / "base.safetensors", [f / "lora.safetensors"], out, force=True, progress=p),
    "inspect": lambda f, out, p: inspect(f / "lora.safetensors", progress=p),
    "compare": lambda f, out, p: compare(f / "lora.safetensors", f / "other.safetensors", progress=p),
}


@pytest.mark.parametrize("tool", list(TOOLS))
@pytest.mark.parametrize("there", [False, True], ids=["new", "replacing"])
def test_a_cancelled_tool_leaves_nothing_half_written(tool: str, there: bool, tmp_path: Path) -> None:
    base_of(tmp_path)
    adapter_of(tmp_path / "lora.safetensors", LoRA(rank=4))
    adapter_of(tmp_path / "other.safetensors", LoRA(rank=2), seed=2)
    adapter_of(tmp_path / "loha.safetensors", LoHa(rank=2), nn.Linear)
    if there:
        (tmp_path / "out.safetensors").write_bytes(b"what was there")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = 0

    def progress(done: int, total: int, what: str) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        TOOLS[tool](tmp_path, tmp_path / "out.safetensors", progress)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
