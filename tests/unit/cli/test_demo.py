"""`nerine demo`, as a user runs it but shorter, and the command line around it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nerine
from nerine.tiny import load_pipeline
from nerine.tiny.data import style_set
from nerine.tiny.demo import ALGORITHMS, DemoSettings, Watch, _Look, _train

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}

pytest.importorskip("diffusers", reason="the tiny model needs diffusers (extra: train)")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from nerine.cli import main; sys.argv[0] = 'nerine'; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, env=ONE_THREAD
    )


@pytest.mark.slow
def test_the_demo_writes_what_it_says(tmp_path: Path) -> None:
    out = tmp_path / "results"
    done = run("demo", "--steps", "2", "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["steps"] == 2
    assert report["layers"] > 50
    assert 0 < report["loss_after"] < report["loss_before"]
    assert report["difference_reloaded"] == 0.0
    assert report["difference_merged"] < 1e-4
    assert sorted(p.name for p in out.iterdir()) == ["neon-dora-lokr.png", "neon-dora-lokr.safetensors"]
    assert any(key.endswith(".dora_scale") for key in load_file(out / "neon-dora-lokr.safetensors"))
    assert "step 2/2" in done.stderr


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_the_same_seed_gives_the_same_bits(algo: str) -> None:
    settings = DemoSettings(algo=algo, steps=2, batch=4, seed=3)
    unwatched = _Look(Watch(), lambda: torch.zeros(1))
    states = []
    for _ in range(2):
        pipeline = load_pipeline()
        network = nerine.attach(pipeline.unet, settings.algorithm, generator=torch.Generator().manual_seed(3))
        _train(pipeline, network, settings, style_set(settings.style).train, None, unwatched)
        states.append(network.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--algo", "lorka"], "Error: --algo 'lorka' is not known here. Did you mean"),
        (["--style", "noen"], "neon"),
        (["--out", __file__], "expected a folder for the results, found a file"),
    ],
)
def test_a_refusal_is_one_paragraph_and_exit_code_1(arguments: list[str], words: str) -> None:
    done = run("demo", "--steps", "1", *arguments)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_usage_is_exit_code_2() -> None:
    assert run("demo", "--stepz", "1").returncode == 2
    assert run("demos").returncode == 2


def test_help_and_version_do_not_load_torch() -> None:
    code = (
        "import sys; from nerine.cli import app; app(['{}'], standalone_mode=False); assert 'torch' not in sys.modules"
    )
    for option in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", code.format(option)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    assert run("--version").stdout.strip() == nerine.__version__
