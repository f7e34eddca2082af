"""What all commands have in common where they report: JSON alone on stdout, plain text in a pipe, ASCII where there is
no more, and a terminal whose wishes are respected."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file

from blocky_model import adapter_of, base_of
from commands import run
from nerine import DoRA, LoRA
from nerine.cli import app
from nerine.cli.shared import show
from nerine.files.store import write_file

pty = pytest.importorskip("pty", reason="terminals of POSIX")

REPORTS = {
    "inspect": "inspect a.safetensors --layers --base base.safetensors",
    "compare": "compare a.safetensors b.safetensors",
    "verify": "verify a.safetensors --base base.safetensors --dialect kohya",
    "convert": "convert a.safetensors -o converted.safetensors --to lora --rank 2 --force",
    "resize": "resize a.safetensors -o resized.safetensors --rank 2 --force",
    "combine": "combine a.safetensors:0.5 a.safetensors -o both.safetensors --force",
    "merge": "merge base.safetensors a.safetensors -o merged.safetensors --verify 2 --force",
    "extract": "extract base.safetensors tuned.safetensors -o taken.safetensors --rank 2 --dialect lycoris --force",
    "suggest": "suggest base.safetensors tuned.safetensors --algos lora,lokr",
    "plan": "plan base.safetensors --layers --rank 2",
    "presets": "presets --model base.safetensors",
    "metadata show": "metadata show a.safetensors",
    "metadata edit": "metadata edit a.safetensors --set title=Ünïcode -o edited.safetensors --force",
    "metadata strip": "metadata strip a.safetensors -o stripped.safetensors --force",
    "bundle pack": "bundle pack a.safetensors -e cat=cat.safetensors -o bundle.safetensors --force",
    "bundle list": "bundle list bundle.safetensors",
    "bundle unpack": "bundle unpack bundle.safetensors -o parts --force",
    "doctor": "doctor --no-self-test",
    "explain": "explain wrong-model",
}
ELSEWHERE = {"train": "test_train.py", "generate": "test_generate.py", "demo": "test_demo.py", "ui": "test_ui.py"}
PROGRAM = """
import shlex, sys
from nerine.cli import main
for line in sys.stdin.read().splitlines() if len(sys.argv) == 1 else sys.argv[1:]:
    sys.argv = ["nerine", *shlex.split(line)]
    try:
        main()
    except SystemExit as end:
        print(f"\\n[{line}: {end.code}]", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files are that the reports are about."""
    place = tmp_path_factory.mktemp("reports")
    base = base_of(place)
    adapter_of(place / "a.safetensors", LoRA(rank=4), size=0.1, metadata={"modelspec.title": "Ünïcode ▁█ → ✓"})
    adapter_of(place / "b.safetensors", DoRA(LoRA(rank=2)), size=0.1)
    from safetensors.torch import load_file

    rng = torch.Generator().manual_seed(5)
    tuned = {
        key: t + 0.01 * torch.randn(t.shape, generator=rng) if t.dim() > 1 else t for key, t in load_file(base).items()
    }
    write_file(place / "tuned.safetensors", tuned, {})
    save_file({"emb_params": torch.ones(2, 768)}, place / "cat.safetensors")
    return place


def in_a_process(folder: Path, *lines: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Commands one after another in one process, with pipes for a terminal."""
    drop = {"COLUMNS", "FORCE_COLOR", "NO_COLOR", "TERM", "PYTHONIOENCODING", "PYTHONUTF8", "NERINE_TRACEBACK"}
    env = {name: value for name, value in os.environ.items() if name not in drop}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *lines], cwd=folder, env={**env, **variables}, capture_output=True, timeout=300
    )


def in_a_terminal(folder: Path, code: str, *lines: str, **variables: str) -> str:
    """What a program writes to a terminal of 60 columns."""
    drop = {"COLUMNS", "FORCE_COLOR", "NO_COLOR", "TERM", "NERINE_TRACEBACK"}
    env = {name: value for name, value in os.environ.items() if name not in drop}
    main, other = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 60, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", code, *lines],
        cwd=folder,
        env={**env, "TERM": "xterm-256color", **variables},
        stdout=other,
        stderr=other,
        stdin=other,
    )
    os.close(other)
    found = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        found += part
    process.wait(timeout=60)
    os.close(main)
    return found.decode()


def leaves(group: Any, path: str = "") -> dict[str, Any]:
    found = {}
    for name, command in group.commands.items():
        where = f"{path} {name}".strip()
        found |= leaves(command, where) if hasattr(command, "commands") else {where: command}
    return found


COMMANDS = leaves(typer.main.get_command(app))


def test_every_command_is_here() -> None:
    assert set(REPORTS) | set(ELSEWHERE) == set(COMMANDS)


# -- JSON --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json(name: str) -> None:
    assert "--json" in {one for param in COMMANDS[name].params for one in param.opts}


def test_json_alone_is_on_stdout(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    monkeypatch.chdir(folder)
    for line in REPORTS.values():
        done = run(capsys, *shlex.split(line), "--json")
        assert done.code in (0, 3), f"{line}\n{done.err}"
        assert json.loads(done.out, parse_constant=refuse), line


def test_an_error_with_json_is_a_paragraph_on_stderr(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    done = run(capsys, "inspect", tmp_path / "none", "--json")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("Error: ")


def test_numbers_that_are_none_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    class Odd:
        def to_dict(self) -> dict[str, Any]:
            return {"a": float("nan"), "b": [float("inf"), (1.5, Path("x"))], "c": {"d": -float("inf")}}

    show(Odd(), True)
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, [1.5, "x"]], "c": {"d": None}}


# -- pipes and encodings -----------------------------------------------------------------------------------------------
def test_ascii_is_enough_for_every_report(folder: Path) -> None:
    """No letter that the encoding lacks stops a report; and nothing in a pipe is for a terminal."""
    lines = [*REPORTS.values(), "explain", "", "merge --help", "inspect nöwhere", "presets →"]
    done = in_a_process(folder, *lines, PYTHONIOENCODING="ascii", LC_ALL="C")
    err = done.stderr.decode("ascii")
    assert done.returncode == 0, err
    ends = dict(re.findall(r"^\[(.*): (\w+)\]$", err, re.MULTILINE))
    assert len(ends) == len(lines), err
    assert {line: code for line, code in ends.items() if code not in ("0", "3")} == {
        "inspect n\\xf6where": "1",
        "presets ->": "1",
    }
    out = done.stdout.decode("ascii")
    assert "\\xdcn\\xefcode .# -> ok" in out
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", out + err)
    assert "Traceback" not in err


def test_colours_are_forced_into_a_pipe_and_lines_stay_still(folder: Path) -> None:
    done = in_a_process(folder, "", "inspect a.safetensors", "presets x", FORCE_COLOR="1", COLUMNS="40")
    out, err = done.stdout.decode(), done.stderr.decode()
    assert "\x1b[1mI want to:\x1b[0m" in out
    assert "\x1b[36mmerge" in out
    assert "\x1b[1;31mError:\x1b[0m no preset" in err
    assert set(re.findall(r"\x1b\[[\d;]*([A-Za-z])", out + err)) == {"m"}  # colours, no cursor that moves
    none = in_a_process(folder, "", "inspect a.safetensors", "presets x", FORCE_COLOR="1", NO_COLOR="1")
    assert not re.search(r"\x1b\[(1;)?3\d", (none.stdout + none.stderr).decode())


# -- terminals ---------------------------------------------------------------------------------------------------------
LINES = ("", "inspect a.safetensors", "merge --help", "presets x")


def test_a_terminal_has_colours_and_its_own_width(folder: Path) -> None:
    text = in_a_terminal(folder, PROGRAM, *LINES)
    assert "\x1b[1mI want to:\x1b[0m" in text
    assert "\x1b[1;31mError:\x1b[0m no preset is called 'x'." in text
    plain = re.sub(r"\x1b\[[\d;]*m", "", text).replace("\r", "")
    help_lines = plain[plain.index("Merge adapters") : plain.index("[merge --help")].splitlines()
    assert 50 < max(map(len, help_lines)) <= 60


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_a_terminal_without_colours(folder: Path, variables: dict[str, str]) -> None:
    text = in_a_terminal(folder, PROGRAM, *LINES, **variables)
    assert not re.search(r"\x1b\[(\d;)?3\d", text)
    if "TERM" in variables:
        assert "\x1b" not in text


BARS = """
import sys, time
from nerine.cli.progress import training_bar
from nerine.cli.shared import bar
from nerine.cli.terminal import console, prepare_streams
prepare_streams()
with training_bar(20, console(stderr=True)) as report:
    for step in range(1, 21):
        report(step, 1 / step)
with bar("merging") as report:
    report(1, 3, "first")
    time.sleep(1.1)
    report(2, 3, "second")
    time.sleep(0.3)
print("done")
"""


def test_bars_move_on_a_terminal_alone(folder: Path) -> None:
    moving = in_a_terminal(folder, BARS)
    assert "\x1b[2K" in moving or "\x1b[1A" in moving
    assert "merging" in moving
    dumb = in_a_terminal(folder, BARS, TERM="dumb")
    assert "\x1b" not in dumb
    assert "step 20/20  loss" in dumb
    assert "merging" not in dumb
    for variables in ({}, {"FORCE_COLOR": "1"}, {"PYTHONIOENCODING": "ascii"}):
        env = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "NO_COLOR", "COLUMNS")}
        done = subprocess.run([sys.executable, "-c", BARS], env={**env, **variables}, capture_output=True, timeout=60)
        assert done.stdout == b"done\n"
        err = done.stderr.decode("ascii")
        assert "step 20/20  loss" in err
        assert not re.search(r"\x1b\[[\d;]*[A-Za-ln-z]|\r", err)
