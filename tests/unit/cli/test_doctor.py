"""`nerine doctor`: what it finds here, and that it says so where something is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from commands import run
from nerine.algorithms import REGISTRY
from nerine.errors import MergeError
from nerine.model.toml import parse
from nerine.tools import doctor
from nerine.tools.doctor import Check, machine, promise
from nerine.tools.doctor.report import DoctorReport, Extra, Finding

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def _sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing were to be said about this machine."""
    monkeypatch.setattr(doctor, "findings", lambda: iter(()))


@pytest.mark.usefixtures("_sound")
def test_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "doctor")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert [line for line in lines if len(line) > 80 and " " in line[16:]] == []
    for title in ("Versions", "Machine", "Devices", "Disk", "Extras", "Findings"):
        assert title in lines
    assert any(re.match(r"  torch +2\.", line) for line in lines)
    assert lines[-1] == "This installation: sound"
    for name in (*REGISTRY, "dora(lora)"):
        assert any(re.match(rf"  {re.escape(name)} +cpu .* holds$", line) for line in lines), name


@pytest.mark.usefixtures("_sound")
def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "doctor", "--json", "--no-self-test")
    found = json.loads(done.out)
    assert (done.code, done.err, found["sound"], found["checks"]) == (0, "", True, [])
    assert found["facts"]["Versions"]["torch"] == torch.__version__.split("+")[0] or "+" in torch.__version__
    assert {one["name"] for one in found["extras"]} <= set(machine.PURPOSES)


@pytest.mark.usefixtures("_sound")
def test_a_promise_that_is_broken_is_wrong(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tried = [
        Check("lora", "cpu", 0.0, 0.02, False),
        Check("lokr", "cuda:0", float("nan"), 0.0, False, "RuntimeError: x"),
    ]
    monkeypatch.setattr(doctor, "checks", lambda devices: iter(tried))
    done = run(capsys, "doctor")
    assert done.code == 3
    assert "lora on cpu: differs by 2.0e-02, more than 1e-04" in done.out
    assert "lokr on cuda:0: RuntimeError: x" in done.out
    assert "DOES NOT HOLD" in done.out
    found = json.loads(run(capsys, "doctor", "--json").out)
    assert found["sound"] is False
    assert found["checks"][1]["reloaded"] is None  # NaN is no JSON


def test_the_checks_compute_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(promise.checks(["cpu"]))
    assert {one.algorithm for one in found} == {*REGISTRY, "dora(lora)", "dora(lokr)"}
    assert all(one.holds and one.error == "" for one in found)
    monkeypatch.setattr(promise, "_SIZE", 0.0)
    with pytest.raises(MergeError, match="changes nothing"):
        promise._differences(promise._example(REGISTRY["lora"]), "cpu")


def test_what_raises_does_not_hold() -> None:
    (found, *_) = promise.checks(["no-such-device"])
    assert not found.holds
    assert "no-such-device" in found.error


@pytest.mark.parametrize(
    ("torch_version", "vision", "wrong"),
    [
        ("2.13.0+cpu", "0.28.0", []),
        ("2.13.0", "0.19.1", ["torchvision 0.19.1 does not belong to torch 2.13.0, which goes with 0.28"]),
        ("2.3.1", "", ["torch 2.3.1 is too old"]),
    ],
)
def test_bad_pairs(torch_version: str, vision: str, wrong: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(machine, "version_of", {"torchvision": vision, "nerine": "1"}.get)
    found = [one.text for one in machine.findings() if one.is_wrong]
    assert len(found) == len(wrong)
    assert all(text.startswith(start) for text, start in zip(found, wrong, strict=True))


def test_lycoris_beside_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version_of", {"lycoris-lora": "4.1.3", "nerine": "1"}.get)
    (note,) = [one for one in machine.findings() if "LyCORIS" in one.text]
    assert not note.is_wrong


def test_extras_are_those_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    project = parse((ROOT / "pyproject.toml").read_text(encoding="utf-8"), "pyproject.toml")["project"]
    assert set(machine.PURPOSES) == set(project["optional-dependencies"]) - {"dev", "docs", "peers"}
    monkeypatch.setattr(
        machine.records,
        "requires",
        lambda name: ['pillow; extra == "train"', "nothing-of-that-name; extra == 'train'", "torch>=2.4"],
    )
    (train,) = machine.extras()
    assert (train.name, train.missing) == ("train", ["nothing-of-that-name"])
    assert list(train.versions) == ["pillow"]
    assert train.state == "missing: nothing-of-that-name"


def test_the_text_of_extras_and_findings() -> None:
    report = DoctorReport(
        facts={"Versions": {"nerine": "1"}, "Environment": {}},
        extras=[Extra("ui", "the browser", {}, ["gradio"]), Extra("plots", "curves", {"matplotlib": "3"}, [])],
        checks=[],
        seconds=0.0,
        findings=[Finding("a note " * 20), Finding("bad", True)],
    )
    text = str(report)
    assert not report.is_sound
    assert '  ui          not installed; for the browser\n              pip install "nerine[ui]"\n' in text
    assert "  plots       installed; for curves\n\n" in text
    assert "Environment" not in text
    assert "\n  WRONG  bad" in text
    assert max(map(len, text.splitlines())) <= 80


def test_devices_and_disks_are_told() -> None:
    assert "cpu" in machine.devices()
    assert all("GB free" in value for value in machine.disks().values())
    assert machine.memory_bytes() > 10**8


def test_the_promise_on_a_gpu(run_on_simulated_cuda: Callable[[str], None]) -> None:
    run_on_simulated_cuda("""
        from nerine.tools.doctor.machine import devices
        from nerine.tools.doctor.promise import checks

        assert "cuda:0" in devices(), devices()
        found = list(checks(["cuda:0"]))
        assert len(found) > 12
        assert all(one.holds for one in found), [one for one in found if not one.holds]
    """)
