"""Damaged files, 2,000 of them: each is loaded or refused in words, and the model is as before."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import nerine
from fuzz import worker
from fuzz.mutations import File, damaged, join, mutate, spelled
from fuzz.seeds import SETTINGS, seeds
from fuzz.targets import TARGETS, Loading, Resuming
from fuzz.worker import judged
from nerine.files.store import open_file
from source_tree import ROOT

INPUTS, SEED = 2000, 20


def run(tmp_path: Path, *arguments: str, tests: Path = ROOT / "tests") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fuzz.run", *arguments, "--out", str(tmp_path / "findings")]
    path = os.pathsep.join([str(tests), str(ROOT / "tests"), str(ROOT / "src")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="bounds its memory as Linux does")
def test_damaged_files_are_loaded_or_refused(tmp_path: Path) -> None:
    done = run(tmp_path, str(INPUTS), "--seed", str(SEED), "--workers", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"0 findings with seed {SEED}" in done.stdout
    counts = {(m[1], m[2]): int(m[3].replace(",", "")) for m in re.finditer(r"(\w+): (\w+) +([\d,]+)", done.stdout)}
    for target in TARGETS:
        assert sum(n for (name, _), n in counts.items() if name == target) == INPUTS
        assert counts[target, "loaded"] > 30
        assert counts[target, "FormatError"] > 400
    assert counts["load", "ShapeError"] > 200, "nothing of the wrong shape gets past the door"
    assert counts["load", "loaded"] > 400


def test_the_seeds_are_valid_and_of_every_algorithm(tmp_path: Path) -> None:
    assert SETTINGS.keys() <= seeds().keys()
    told = Counter[str]()
    for name, data in seeds().items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data)
        with open_file(path) as source:
            own = json.loads(source.metadata["nerine"])
        told.update(a.get("inner", a)["algorithm"] for a in own["algorithms"])
        assert judged(Loading(), path) == ("loaded", "")
        file = File.of(data)
        entries, payload = file.table()
        path.write_bytes(join(spelled(entries), payload))
        assert judged(Loading(), path) == ("loaded", ""), "taking a file apart and putting it together damages it"
    assert told.keys() == nerine.algorithms.REGISTRY.keys()


def test_an_input_is_the_same_each_time() -> None:
    assert damaged(1, 7) == damaged(1, 7)
    assert damaged(1, 7) != damaged(2, 7)
    assert len({mutate(seeds()["lora"], random.Random(i)) for i in range(100)}) > 60


# -- the judge itself: what it must find -----------------------------------------------------------------------------
def test_other_errors_are_findings(tmp_path: Path) -> None:
    def wrong(path: Path) -> None:
        raise KeyError("x")

    outcome, what = judged(wrong, tmp_path)
    assert outcome == "finding"
    assert "KeyError: 'x'" in what


def test_our_own_errors_are_none_but_for_control_characters(tmp_path: Path) -> None:
    for text, outcome in (("all well", "FormatError"), ("\x1b[31m", "finding"), ("a\u202eb", "finding")):

        def refuse(path: Path, text: str = text) -> None:
            raise nerine.FormatError(text)

        assert judged(refuse, tmp_path)[0] == outcome


def test_a_hang_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "LONGEST", 1)

    def sleep(path: Path) -> None:
        try:
            time.sleep(60)
        except Exception:
            pytest.fail("the alarm was caught")

    outcome, what = judged(sleep, tmp_path)
    assert outcome == "finding"
    assert "Hang: more than 1 s" in what


@pytest.mark.parametrize("what", ["a weight", "a hook", "a module"])
def test_a_changed_model_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def load(model: torch.nn.Module, path: Path) -> None:
        if what == "a weight":
            model.conv.weight[0, 0, 0, 0] += 1
        elif what == "a hook":
            model.conv.forward = model.conv.forward
        else:
            model.conv.add_module("x", torch.nn.Identity())
        raise nerine.FormatError("no")

    target = Loading()
    monkeypatch.setattr(nerine, "load", load)
    outcome, wrong = judged(target, tmp_path)
    assert outcome == "finding"
    assert "AssertionError" in wrong


def test_half_a_file_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(network: nerine.Network, path: Path) -> None:
        with torch.no_grad():
            next(iter(network.parameters())).add_(1)
        raise nerine.FormatError("no")

    target = Resuming()
    monkeypatch.setattr(nerine, "load", load)
    outcome, wrong = judged(target, tmp_path)
    assert outcome == "finding"
    assert "half of a file" in wrong


BAD = """
import os
import torch
from fuzz import mutations, worker

fatal, greedy = (mutations.damaged(3, index)[1] for index in (2, 5))

def reading():
    def read(path):
        data = path.read_bytes()
        if data == fatal:
            os.kill(os.getpid(), 11)
        if data == greedy:
            torch.ones(2**29)
    return read

worker.TARGETS.clear()
worker.TARGETS["read"] = reading
worker.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="bounds its memory as Linux does")
@pytest.mark.slow
def test_deaths_and_greed_are_findings(tmp_path: Path) -> None:
    """A target that dies of one input and takes 2 GiB for another: both are saved, and the others are still tried."""
    (tmp_path / "bad_worker.py").write_text(BAD)
    done = run(tmp_path, "8", "--seed", "3", "--workers", "1", "--worker", "bad_worker", tests=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 findings with seed 3" in done.stdout
    assert re.search(r"read: loaded +4\n", done.stdout), done.stdout  # what was tried before the death is not counted
    told = {path.name: path.read_text() for path in (tmp_path / "findings").glob("*.txt")}
    assert "ended with status -11" in told["3-2-any.txt"]
    assert "can't allocate memory" in told["3-5-read.txt"]
    assert (tmp_path / "findings" / "3-2-any.safetensors").read_bytes() == damaged(3, 2)[1]
    assert (tmp_path / "findings" / "3-5-read.safetensors").read_bytes() == damaged(3, 5)[1]
