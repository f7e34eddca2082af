"""What the shell completes, asked as the shells ask: through variables, one process for each question."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import typing

import pytest

from commands import run
from nerine.algorithms import REGISTRY, DoRA
from nerine.cli import choices
from nerine.cli.combine import METHODS
from nerine.files.dialects import DIALECTS
from nerine.model.presets import PRESETS
from nerine.tools import blend

BARE = {name: value for name, value in os.environ.items() if not name.startswith(("_TYPER", "COMP_"))}
PROGRAM = (
    "import sys, atexit; sys.argv = ['nerine'];"
    "atexit.register(lambda: print(*sorted({'torch', 'rich', 'numpy'} & set(sys.modules)), file=sys.stderr));"
    "from nerine.cli import main; main()"
)


def ask(**variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**BARE, **variables}, capture_output=True, text=True, timeout=60
    )


def bash(*words: str) -> list[str]:
    """The completions of the last word."""
    done = ask(_NERINE_COMPLETE="complete_bash", COMP_WORDS=" ".join(words), COMP_CWORD=str(len(words) - 1))
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "", f"loaded: {done.stderr}"
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("nerine", "me"), ["merge", "metadata"]),
        (("nerine", "metadata", ""), ["show", "edit", "strip"]),
        (("nerine", "convert", "--dia"), ["--dialect"]),
        (("nerine", "convert", "a.safetensors", "--dialect", "k"), ["kohya"]),
        (("nerine", "convert", "a.safetensors", "--to", "lo"), ["loha", "lokr", "lora"]),
        (("nerine", "presets", "attn"), ["attn-mlp", "attn-only"]),
        (("nerine", "merge", "a", "b", "--dtype", "f"), ["fp16", "fp32"]),
        (("nerine", "combine", "a", "--method", "dare"), ["dare", "dare_linear", "dare_ties"]),
        (("nerine", "train", "--quantize", "n"), ["none", "nf4"]),
        (("nerine", "explain", "wrong"), ["wrong-model"]),
        (("nerine", "inspect", ""), []),  # the shell completes files then
        (("nerine", "merge", "base.safetensors", ""), []),
    ],
)
def test_bash(words: tuple[str, ...], found: list[str]) -> None:
    assert bash(*words) == found


def test_zsh_and_fish_show_explanations() -> None:
    done = ask(_NERINE_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="nerine explain wrong")
    assert '"wrong-model":"The adapter is for another model"' in done.stdout
    files = ask(_NERINE_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="nerine inspect ")
    assert files.stdout.strip() == "_files"
    fish = {"_NERINE_COMPLETE": "complete_fish", "_TYPER_COMPLETE_ARGS": "nerine plan x --targets attn"}
    done = ask(**fish, _TYPER_COMPLETE_FISH_ACTION="get-args")
    assert done.stdout.split() == ["attn-mlp", "attn-only"]
    assert ask(**fish, _TYPER_COMPLETE_FISH_ACTION="is-args").returncode == 0
    fish["_TYPER_COMPLETE_ARGS"] = "nerine inspect "
    assert ask(**fish, _TYPER_COMPLETE_FISH_ACTION="is-args").returncode == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell(shell: str) -> None:
    done = ask(_NERINE_COMPLETE=f"source_{shell}")
    assert done.returncode == 0, done.stderr
    assert "_NERINE_COMPLETE=complete_" in done.stdout


def test_it_can_be_installed(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "--help").out
    assert "--install-completion" in text
    assert "--show-completion" in text


def test_the_names_are_those_of_the_library() -> None:
    """They are read from the source, without importing it."""
    assert set(choices.algorithms("")) == {*REGISTRY, DoRA.name}
    assert set(choices.dialects("")) == set(DIALECTS)
    assert set(choices.presets("")) == set(PRESETS)
    assert choices.targets("!attn-o") == ["!attn-only"]
    assert set(METHODS) == set(typing.get_args(getattr(blend, "Method", None)) or blend.METHODS)


def test_completing_is_fast() -> None:
    """Beyond the start of Python; CPU time, for other tests may run beside this one."""

    def seconds(code: str, **variables: str) -> float:
        spent = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", code], env={**BARE, **variables}, capture_output=True, timeout=60)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return min(spent)

    asked = {"_NERINE_COMPLETE": "complete_bash", "COMP_WORDS": "nerine convert --dialect ", "COMP_CWORD": "3"}
    assert seconds(PROGRAM, **asked) - seconds("pass") < 0.8  # half of it on a machine that does nothing else
