"""`nerine train` under `accelerate launch`: two processes make the steps that one would make with the doubled batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import nerine
from nerine.tiny import load_pipeline, style_set

pytest.importorskip("accelerate")
STEPS = 5
COMMON = ["--targets", "attn-only", "--rank", "2", "--steps", str(STEPS), "--save-dtype", "fp32", "--device", "cpu"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def train(folder: Path, out: str, processes: int, *more: str) -> Path:
    """Run the command in so many processes; the folder of the run."""
    launcher = [sys.executable, "-m", "nerine"]
    if processes > 1:
        launcher = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            str(processes),
        ]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launcher += ["--main_process_port", str(free_port()), "-m", "nerine"]
    done = subprocess.run(
        [*launcher, "train", "--data", str(folder / "pictures"), "--out", str(folder / out), *COMMON, *more],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / out


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def numbers(out: Path, name: str) -> torch.Tensor:
    return torch.tensor([row[name] for row in rows(out) if name in row], dtype=torch.float64)


def adapters(out: Path) -> dict[str, torch.Tensor]:
    return nerine.load(load_pipeline(), out / "adapter.safetensors", strict=True).state_dict()


def agree(one: Path, two: Path) -> None:
    for name, digits in (("loss", 1e-5), ("grad_norm", 1e-4), ("validation", 1e-5)):
        a, b = numbers(one, name), numbers(two, name)
        assert len(a) == len(b) > 0, name
        assert torch.allclose(a, b, rtol=digits), (name, a, b)
    first, second = adapters(one), adapters(two)
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-4
    assert max(float(t.abs().max()) for name, t in first.items() if name.endswith("up")) > 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("training")
    style_set("neon").write(found / "pictures")
    return found


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    return train(folder, "alone", 1, "--batch-size", "4", "--validation-share", "0.05", "--accumulate", "2")


@pytest.mark.slow
def test_two_processes_are_one_with_the_doubled_batch(folder: Path, alone: Path) -> None:
    two = train(folder, "two", 2, "--batch-size", "2", "--validation-share", "0.05", "--accumulate", "2")
    agree(alone, two)


@pytest.mark.slow
def test_two_processes_with_the_denoiser_in_pieces(folder: Path, alone: Path) -> None:
    """FSDP2, the adapters inside; a run of three steps goes on to the end."""
    more = ["--batch-size", "2", "--validation-share", "0.05", "--accumulate", "2", "--shard"]
    agree(alone, train(folder, "shard", 2, *more))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["--no-shard", "--shard"])
def test_two_processes_go_on_from_a_checkpoint(folder: Path, way: str) -> None:
    more = ["--batch-size", "2", "--validation-share", "0.05", "--save-every", "2", "--ema", "0.9", way]
    whole = train(folder, f"whole{way}", 2, *more)
    again = folder / f"again{way}"
    (again / "checkpoints").mkdir(parents=True)
    for file in ("settings.toml", "history.jsonl"):
        text = (whole / file).read_text()
        (again / file).write_text(text.replace(str(whole), str(again)))
    kept = sorted((whole / "checkpoints").iterdir())[0]
    assert int(kept.name) < STEPS
    kept.rename(again / "checkpoints" / kept.name)
    train(folder, again.name, 2, *more, "--resume")
    assert torch.equal(numbers(whole, "loss"), numbers(again, "loss"))
    first, second = adapters(whole), adapters(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
