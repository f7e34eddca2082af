"""What one sees first: `nerine` alone, the help of every command, and that every command shown anywhere is one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from commands import run
from nerine.cli import JOBS, app
from nerine.cli.failure import UsageError
from nerine.cli.help import command_lines, parts_of, summary_of
from nerine.troubles import troubles

ROOT = typer.main.get_command(app)
DOCS = Path(__file__).parents[3] / "docs"


def commands(group: Any = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(names, command) of all commands that do something."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands())


def understood(line: str) -> None:
    """Let the program read a command as it would before it runs.

    Raises:
        UsageError: it does not understand it.
    """
    words = shlex.split(re.split(r" [<>|] ", line)[0], comments=True)
    assert words.pop(0) == "nerine", line
    words = [word for word in words if word != "--traceback"]
    command: Any = ROOT
    while hasattr(command, "commands"):
        if not words:
            return
        if words[0].startswith("--"):
            assert words[0] in {name for param in command.get_params(typer.Context(command)) for name in param.opts}
            return
        name = words.pop(0)
        assert name in command.commands, line
        command = command.commands[name]
    if words != ["--help"]:
        command.make_context(command.name, words)


def examples_of(command: Any) -> list[str]:
    return parts_of(command.help or "")[1]


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "NO_COLOR", "NERINE_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)


# -- nerine alone ------------------------------------------------------------------------------------------------------
def test_alone_it_shows_what_one_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert len(lines) <= 46
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in done.out
    for job, command in JOBS:
        assert any(job in line and command in line for line in lines), job
    for name in ROOT.commands:  # type: ignore[attr-defined]
        assert sum(bool(re.match(f"  {name}  +[A-Z]", line)) for line in lines) == 1, name


def test_a_group_alone_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "metadata")
    assert (done.code, done.err) == (0, "")
    assert done.out == run(capsys, "metadata", "--help").out
    assert "  strip  Remove what a file tells of its training\n" in done.out


@pytest.mark.parametrize("name", ROOT.commands)  # type: ignore[attr-defined]
def test_its_line_in_the_list_is_short(name: str) -> None:
    assert 10 < len(summary_of(ROOT.commands[name].help or "")) <= 67  # type: ignore[attr-defined]


# -- the help of a command ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, *path, "--help")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not re.search(r"<(bool|path|str|int)|\[/?bold\]|\\b", done.out)
    at = lines.index("Examples:")
    assert lines[at + 1].startswith(f"  nerine {' '.join(path)}")
    for param in COMMANDS[path].get_params(typer.Context(COMMANDS[path])):
        assert any(name in done.out for name in (*param.opts, param.name.upper(), param.metavar or "-")), param.name


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_its_examples_are_understood(path: tuple[str, ...]) -> None:
    examples = examples_of(COMMANDS[path])
    assert 1 <= len(examples) <= 4
    for example in examples:
        assert example.startswith(f"nerine {' '.join(path)}")
        understood(example)


def test_a_narrow_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    done = run(capsys, "resize", "--help")
    long = [line for line in done.out.splitlines() if len(line) > 40]
    assert all(" " not in line.strip().removesuffix(" \\") for line in long), long
    assert "      --allow-pickle\n" in done.out


def test_defaults_are_shown_where_they_say_something(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(run(capsys, "convert", "--help").out.split())
    assert "-o, --out PATH Where to write. [required]" in text
    assert "[default: cpu]" in text
    assert "--dora / --no-dora Leave DoRA around it, or multiply it in (with --base). [default: --dora]" in text
    assert "--force Replace what is there. --" in text
    assert "nerine convert [OPTIONS] FILE --out PATH" in text


def test_long_commands_are_cut_as_the_shell_takes_them() -> None:
    command = "nerine extract base.safetensors tuned.safetensors -o adapter.safetensors --rank 32"
    lines = list(command_lines(command, 60))
    assert len(lines) == 2
    assert max(map(len, lines)) <= 60
    assert shlex.split(" ".join(lines).replace("\\ ", "")) == command.split()
    assert list(command_lines("nerine " + "x" * 90, 40))[-1].endswith("x" * 90)


def test_the_parts_of_a_docstring() -> None:
    text = "Do it: all.\n\nMore\nwords.\n\nExamples:\n    nerine a\n    nerine b --long\n        --more\n"
    assert parts_of(text) == (["Do it: all.", "More words."], ["nerine a", "nerine b --long --more"])
    assert parts_of("Do it.\n\nExample: [bold]nerine a -b[/bold]\n") == (["Do it."], ["nerine a -b"])
    assert parts_of("") == ([], [])
    assert summary_of(text) == "Do it: all"
    assert summary_of(f"Do it: {'all ' * 30}.") == "Do it"


# -- commands that are shown elsewhere ---------------------------------------------------------------------------------
@pytest.mark.parametrize("line", [command for _, command in JOBS])
def test_the_jobs_are_understood(line: str) -> None:
    understood(line)


@pytest.mark.parametrize("key", troubles())
def test_what_troubles_advise_is_understood(key: str) -> None:
    for step in troubles()[key].steps:
        for code in re.findall(r"`([^`]+)`", step):
            if code.startswith("nerine ") and code != "nerine merge":
                understood(code)
            elif code.startswith("--") and "=" not in code:
                wanted = shlex.split(code)[0::2]
                known = {name for command in COMMANDS.values() for param in command.params for name in param.opts}
                assert {word for word in wanted if word.startswith("--")} <= known, code


def test_the_commands_of_the_page_are_understood() -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", (DOCS / "command-line.md").read_text(encoding="utf-8"), re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) >= 8
    for line in lines:
        understood(line)


@pytest.mark.parametrize("line", ["nerine merge a --outt b", "nerine demo --steps four", "nerine inspect"])
def test_what_is_not_understood_is_noticed(line: str) -> None:
    with pytest.raises(UsageError):
        understood(line)
