"""The documents: their Python runs, their commands are understood, their output is real, their links lead somewhere.

Every Python block of a page runs, each page as one program in an empty folder. Commands that need a model which is not
there, or a GPU, are handed to the parser of the command line, so that an option that does not exist is found as well.
Chinese pages are held to the blocks of the English ones.
"""

from __future__ import annotations

import importlib
import io
import re
import shlex
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

from commands import run
from nerine.algorithms import REGISTRY
from nerine.cli import app
from nerine.errors import NerineError
from nerine.files.dialects import DIALECTS
from nerine.integrations.kohya.arguments import ARGUMENTS
from nerine.integrations.kohya.presets import enables_conv, resolve
from nerine.integrations.lycoris.arguments import defaults_of, parse_arguments
from nerine.lycoris import LycorisNetwork

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DOCUMENTS = [ROOT / "README.md", *sorted(DOCS.glob("**/*.md"))]
NEEDS = {  # packages that are not always there
    "pipelines.md": ("diffusers", "transformers", "accelerate", "peft"),
    "migrating-from-peft.md": ("transformers", "peft"),
    "hosts/diffusers.md": ("diffusers",),
    "hosts/peft.md": ("transformers", "peft"),
    "hosts/transformers.md": ("transformers", "accelerate"),
}
WALKED, CHINESE = "tutorial.md", ("index.md", "tutorial.md")
WORK = {  # pages whose commands run as they stand, and those that are among them
    "tools.md": {"inspect", "compare", "verify", "merge", "extract", "suggest", "convert", "resize", "combine"},
    "training.md": {"train", "generate"},
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name_of(document: Path) -> str:
    return document.relative_to(DOCS).as_posix() if document.is_relative_to(DOCS) else document.name


def fences(document: Path) -> list[tuple[str, str]]:
    """(language, text) of every block."""
    return FENCE.findall(document.read_text(encoding="utf-8"))


def blocks(document: Path) -> list[str]:
    """The Python blocks of a document, each at its own line numbers, so that a traceback points into the document."""
    text = document.read_text(encoding="utf-8")
    found = [m for m in FENCE.finditer(text) if m.group(1) == "python"]
    return ["\n" * text[: m.start(2)].count("\n") + m.group(2) for m in found]


def runnable() -> list[Any]:
    """The documents with code that is run nowhere else; where it uses other packages, those may warn of their own
    future."""
    warns = [
        pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
        pytest.mark.no_device_guard,
    ]
    elsewhere = {WALKED, *WORK, *(f"zh/{name}" for name in CHINESE)}
    return [
        pytest.param(d, id=name_of(d), marks=warns if name_of(d) in NEEDS else [])
        for d in DOCUMENTS
        if blocks(d) and name_of(d) not in elsewhere
    ]


@pytest.fixture
def presets_of_lycoris() -> Iterator[None]:
    """`nerine.lycoris` keeps presets on a class, as LyCORIS does; a page must not leave its own there."""
    kept = {name: value for name, value in vars(LycorisNetwork).items() if name.isupper() and not name.startswith("_")}
    yield
    for name, value in kept.items():
        setattr(LycorisNetwork, name, value)


@pytest.mark.usefixtures("presets_of_lycoris")
@pytest.mark.parametrize("document", runnable())
def test_the_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS.get(name_of(document), ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    program = types.ModuleType("document")
    monkeypatch.setitem(sys.modules, "document", program)  # where dataclasses and pickle look a class up
    for code in blocks(document):
        exec(compile(code, str(document), "exec", dont_inherit=True), program.__dict__)


# -- commands that run -----------------------------------------------------------------------------------------------
@pytest.mark.no_device_guard
@pytest.mark.parametrize(("page", "commands"), WORK.items())
@pytest.mark.slow
def test_the_commands_of_a_page_run(
    page: str, commands: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every `nerine` line of a page, in order, on the files that its first block makes."""
    for package in ("diffusers", "accelerate"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    ran: dict[str, int] = {}
    space: dict[str, Any] = {}
    for kind, code in fences(DOCS / page):
        if kind == "python":
            exec(compile(code, f"docs/{page}", "exec", dont_inherit=True), space)
        if kind != "sh":
            continue
        for line in code.splitlines():
            words = shlex.split(line)
            assert words[0] == "nerine", line
            done = run(capsys, *words[1:])
            assert done.code == 0, f"{line}\n{done.out}\n{done.err}"
            assert done.out.strip(), line
            ran[words[1]] = ran.get(words[1], 0) + 1
    assert set(ran) >= commands


@pytest.mark.no_device_guard
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.slow
def test_the_tutorial_shows_what_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tutorial from top to bottom; what a block printed is what the block of text after it shows.

    The demo is left out: it takes minutes, and has tests of its own.
    """
    for package in ("diffusers", "accelerate", "PIL"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "118")
    space: dict[str, Any] = {}
    seen: str | None = None
    compared = 0
    for kind, code in fences(DOCS / WALKED):
        if kind == "python":
            out = io.StringIO()
            with redirect_stdout(out):
                exec(compile(code, f"docs/{WALKED}", "exec", dont_inherit=True), space)
            seen = out.getvalue()
        elif kind == "sh" and shlex.split(code)[:2] != ["nerine", "demo"]:
            done = run(capsys, *shlex.split(code)[1:])
            assert done.code == 0, f"{code}\n{done.out}\n{done.err}"
            seen = done.out
        elif kind == "text" and seen is not None:
            assert shows(code, seen), f"shown:\n{code}\nseen:\n{seen}"
            seen, compared = None, compared + 1
        else:
            seen = None
    assert compared >= 12


# -- text that stands for output -------------------------------------------------------------------------------------
NUMBER = re.compile(r"-?\d[\d,]*(\.\d+)?(e[-+]\d+)?")
NEAR, NOTHING = 0.4, 1e-3  # numbers with a point differ by so much between machines; below this they are rounding


def shows(text: str, seen: str) -> bool:
    """Whether the text is what was seen: word by word, numbers about the same; `...` stands for anything."""
    first, *others = [part.split() for part in re.split(r"\.\.\.", text)]
    words = seen.split()
    if not begins(first, words):
        return False
    at = len(first)
    for part in others[:-1]:
        at = next((i + len(part) for i in range(at, len(words) + 1) if begins(part, words[i:])), -1)
        if at < 0:
            return False
    if not others:
        return at == len(words)
    last = others[-1]
    return len(words) - len(last) >= at and begins(last, words[len(words) - len(last) :])


def begins(part: Sequence[str], words: Sequence[str]) -> bool:
    return len(part) <= len(words) and all(map(alike, part, words))


def alike(a: str, b: str) -> bool:
    """Equal words, where numbers in them may differ a little if they have a point; whole numbers may not."""
    if NUMBER.sub("#", a) != NUMBER.sub("#", b):
        return False
    pairs = zip(NUMBER.finditer(a), NUMBER.finditer(b), strict=True)
    return all(near(x.group(), y.group()) for x, y in pairs)


def near(a: str, b: str) -> bool:
    if a == b:
        return True
    x, y = (float(text.replace(",", "")) for text in (a, b))
    small = max(abs(x), abs(y)) <= NOTHING
    return small or ("." in a + b and abs(x - y) <= NEAR * max(abs(x), abs(y)))


@pytest.mark.parametrize(
    ("text", "seen", "same"),
    [
        ("loss 0.27\n", "loss 0.31\n", True),
        ("loss 0.27\n", "loss 0.61\n", False),
        ("83 layers", "84 layers", False),
        ("off by 7.3e-07", "off by 0", True),
        ("off by 7.3e-07", "off by 0.1", False),
        ("a ... d", "a b c d", True),
        ("a ... d", "a b c", False),
        ("...\nb\n...", "a\nb\nc", True),
        ("a", "a b", False),
    ],
)
def test_what_counts_as_the_same(text: str, seen: str, same: bool) -> None:
    assert shows(text, seen) == same


# -- commands that are only read -------------------------------------------------------------------------------------
def lines(document: Path) -> Iterator[list[str]]:
    """The words of every line that a reader would paste into a shell, with lines that go on put together."""
    for kind, code in fences(document):
        if kind in ("sh", "console", "bash", "shell"):
            for line in code.replace("\\\n", " ").splitlines():
                yield shlex.split(line.removeprefix("$ "), comments=True)


def command(words: Sequence[str]) -> list[str] | None:
    """The arguments of nerine in a line, if it is called there; what the shell does with its output is left out."""
    words = words[: next((i for i, word in enumerate(words) if word in (">", ">>", "<", "|", "&&", ";")), None)]
    if words[:1] == ["nerine"]:
        return list(words[1:])
    for here, word in enumerate(words):
        if word == "-m" and words[here + 1 : here + 2] == ["nerine"]:
            return list(words[here + 2 :])
    return None


class Misunderstood(Exception):
    """A command line that the program would answer with its usage."""


@cache
def program() -> Any:
    return typer.main.get_command(app)


def understood(words: Sequence[str]) -> None:
    """Parse a command line as the program would, and run nothing.

    Raises:
        Misunderstood: an unknown command or option, a missing argument, or one too many.
    """
    node, name, rest = program(), "nerine", [word for word in words if word != "--traceback"]
    while hasattr(node, "commands") and rest[:1] and not rest[0].startswith("-"):
        if rest[0] not in node.commands:
            raise Misunderstood(f"{name} has no command {rest[0]!r}")
        name, *rest = rest
        node = node.commands[name]
    if hasattr(node, "commands"):  # it shows what there is, or has an option of its own, which would act at once
        known = {"--help", *(name for option in node.params for name in option.opts)}
        if unknown := [word for word in rest if word not in known]:
            raise Misunderstood(f"{name} has no option {unknown[0]}")
        return
    try:
        node.make_context(name, list(rest))
    except Exception as error:  # typer has its own copy of click's classes in some releases: their names must do
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if "Exit" in kinds:
            return  # --help and --version
        if "UsageError" in kinds:
            raise Misunderstood(getattr(error, "message", "") or str(error)) from error
        raise
    values = dict(pairwise(rest))
    for option, known in {"--dialect": DIALECTS, "--from": DIALECTS, "--algo": REGISTRY, "--to": REGISTRY}.items():
        if option in values and values[option] not in {*known, "auto"}:
            raise Misunderstood(f"{option} {values[option]} is not known")


def network_args(words: Sequence[str]) -> dict[str, str]:
    """What sd-scripts makes of `--network_args a=1 b=2`."""
    if "--network_args" not in words:
        return {}
    after = words[words.index("--network_args") + 1 :]
    end = next((i for i, word in enumerate(after) if word.startswith("--")), len(after))
    return dict(word.split("=", 1) for word in after[:end])


def host_understood(words: Sequence[str]) -> None:
    """What sd-scripts and nerine.kohya do with the options of a line, up to the models.

    Raises:
        OptionError: an unknown argument, or a bad value.
    """
    assert words[words.index("nerine.kohya") - 1] == "--network_module", words
    assert callable(importlib.import_module("nerine.kohya").create_network)
    given, preset = parse_arguments(network_args(words), "network_args", ARGUMENTS)
    assert defaults_of(given, 16, 8.0, enables_conv(resolve(preset)))


def test_the_commands_are_understood() -> None:
    """Of every page, in one test: reading a command takes milliseconds."""
    wrong, count = [], 0
    for document in DOCUMENTS:
        for words in lines(document):
            arguments = command(words)
            count += arguments is not None
            try:
                if arguments is not None:
                    understood(arguments)
                if "nerine.kohya" in words:
                    host_understood(words)
            except (Misunderstood, NerineError) as error:
                wrong.append(f"{name_of(document)}: {shlex.join(words)}: {error}")
    assert wrong == []
    assert count > 60


@pytest.mark.parametrize(
    "line",
    ["nerine inspekt a", "nerine inspect a --bass b", "nerine convert a", "nerine convert a -o b --dialect cmfy"],
)
def test_a_wrong_command_is_found(line: str) -> None:
    with pytest.raises(Misunderstood):
        understood(shlex.split(line)[1:])


def test_a_wrong_network_argument_is_found() -> None:
    words = shlex.split("launch x.py --network_module nerine.kohya --network_args algo=lokr faktor=8 --seed 1")
    assert network_args(words) == {"algo": "lokr", "faktor": "8"}
    with pytest.raises(NerineError, match="factor"):
        parse_arguments(network_args(words), "network_args", ARGUMENTS)


def test_hosts_have_commands_to_paste() -> None:
    """A page of a host has a command that is checked, or a block that runs."""
    pages = [page for page in sorted((DOCS / "hosts").glob("*.md")) if page.name != "index.md"]
    bare = [page.name for page in pages if not blocks(page) and not any(command(words) for words in lines(page))]
    assert len(pages) >= 6
    assert bare == []
    assert sum("nerine.kohya" in words for words in lines(DOCS / "sd-scripts.md")) >= 4


TRAINERS = {  # rows of the page of OneTrainer and ai-toolkit, and what the table of dialects calls them
    "LoRA": "LoRA",
    "LoKr": "LoKr",
    "LoHa": "LoHa",
    "DoRA around LoRA, over outputs": "DoRA of LoRA, out",
    "DoRA around LoRA, over inputs": "DoRA of LoRA, in",
    "Full": "Full",
    "OFTv2": "OFTv2",
}


def rows(document: Path) -> dict[str, list[str]]:
    """The cells of all tables of a page by their first one."""
    table = [
        line.strip("|").split("|") for line in document.read_text(encoding="utf-8").splitlines() if line[:1] == "|"
    ]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in reversed(table)}


def test_what_two_trainers_hold_is_what_the_table_of_dialects_says() -> None:
    page, dialects = rows(DOCS / "hosts" / "onetrainer-ai-toolkit.md"), rows(DOCS / "files.md")
    columns = [dialects["adapter"].index(name) for name in ("onetrainer", "ai-toolkit")]
    for name, known in TRAINERS.items():
        assert page[name] == ["yes" if dialects[known][column] else "no" for column in columns], name


# -- languages and links ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CHINESE)
def test_chinese_pages_have_the_blocks_of_the_english_ones(name: str) -> None:
    assert fences(DOCS / "zh" / name) == fences(DOCS / name)


def test_the_links_lead_somewhere() -> None:
    astray = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text) + re.findall(r'src="([^":]+)"', text)
        astray += [f"{name_of(document)}: {t}" for t in targets if not (document.parent / t).exists()]
    assert astray == []


def test_the_readme_shows_code() -> None:
    assert blocks(ROOT / "README.md")
