"""The site is whole: every page has a place, no link is broken, and nothing comes from the network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")

Generator = Callable[[str], ModuleType]
ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
KNOWN = ("https://arxiv.org/", "https://doi.org/", "https://triton-lang.org", "https://semver.org")
ADDRESS = re.compile(r"https?://[^\s)>\"'`]+")


def pages() -> list[Path]:
    return [file for file in sorted(DOCS.rglob("*.md")) if DOCS / "generate" not in file.parents]


def configured() -> Any:
    """mkdocs.yml as plain data."""
    import yaml

    class Plain(yaml.SafeLoader):
        """Names of Python objects are left as they are written."""

    Plain.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, suffix, node: suffix)
    return yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Plain)


def in_nav(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from in_nav(entry)


def test_every_page_has_a_place(generator: Generator) -> None:
    listed = list(in_nav(configured()["nav"]))
    there = [page.relative_to(DOCS).as_posix() for page in pages()]
    assert sorted(listed) == sorted([*there, *generator("hooks").ORIGINS])


def test_no_page_leads_anywhere_else() -> None:
    here = ("http://127.0.0.1", "http://localhost")  # what a program of ours says when it has started
    found = [
        f"{page.relative_to(DOCS).as_posix()}: {address}"
        for page in pages()
        for address in ADDRESS.findall(page.read_text(encoding="utf-8"))
        if not address.startswith((*KNOWN, *here))
    ]
    assert found == []


@pytest.mark.parametrize("package", ["nerine", "nerine.tools", "nerine.serving", "nerine.testing", "nerine.tiny"])
def test_the_reference_has_every_public_name(package: str) -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "reference").glob("*.md")))
    documented = set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))
    if "nerine.errors" in documented:  # a page of its own, all of it
        documented |= {f"nerine.{name}" for name in import_module("nerine.errors").__all__}
    if "nerine.testing.places" in documented:
        documented |= {f"nerine.testing.{name}" for name in ("PLACES", "FEW")}
    names = set(import_module(package).__all__) - {"__version__"}
    assert {name for name in names if f"{package}.{name}" not in documented} == set()


def test_the_theme_loads_nothing() -> None:
    theme = configured()["theme"]
    assert theme["font"] is False
    assert "navigation.instant" not in theme["features"]
    styles = (DOCS / "stylesheets" / "site.css").read_text(encoding="utf-8")
    assert re.findall(r"@import|url\(", styles) == []


@pytest.mark.parametrize(
    ("page", "text", "expected"),
    [
        ("training.md", "see [tools](tools.md#a)", "see [tools](tools.md#a)"),
        ("reference/index.md", "[x](../tools.md)", "[x](../tools.md)"),
        ("kernels.md", "[contributing](../CONTRIBUTING.md#tests)", "[contributing](contributing.md#tests)"),
        ("hosts/a.md", "[back](../../README.md)", "[back](../index.md)"),
        ("scaling.md", "[test_ddp.py](../tests/distributed/test_ddp.py)", "`tests/distributed/test_ddp.py`"),
        ("files.md", "[how it is done](../src/nerine/x.py)", "how it is done (`src/nerine/x.py`)"),
        (
            "benchmarks.md",
            "[p](../docs/performance.md) [`m`](step_maps.py)",
            "[p](performance.md) `benchmarks/step_maps.py`",
        ),
        ("tools.md", "```text\n[x](../src/y.py)\n```\n", "```text\n[x](../src/y.py)\n```\n"),
        ("tools.md", "[a](https://arxiv.org/abs/1) [b](#c)", "[a](https://arxiv.org/abs/1) [b](#c)"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(
    generator: Generator, page: str, text: str, expected: str
) -> None:
    assert generator("hooks").relinked(text, page) == expected


def test_bars_in_the_code_of_tables_are_bars(generator: Generator) -> None:
    text = "| `a \\| b` | c \\| d |\n`e \\| f`\n"
    assert generator("hooks").unescaped(text) == "| `a | b` | c \\| d |\n`e \\| f`\n"


def test_pictures_stand_in_the_page(generator: Generator, tmp_path: Path) -> None:
    (tmp_path / "images" / "algorithms").mkdir(parents=True)
    (tmp_path / "images" / "algorithms" / "x.svg").write_text("<svg a=1>\n<style>p {}</style>\n<g/></svg>\n")
    html = '<p><img alt="X: W + up" src="../../images/algorithms/x.svg" /> <img alt="no" src="../images/demo.png"></p>'
    found = generator("hooks").inlined(html, tmp_path)
    svg = '<svg role="img" aria-label="X: W + up" a=1>\n<g/></svg>'
    expected = f'<p><span class="structure-frame">{svg}</span> <img alt="no" src="../images/demo.png"></p>'
    assert found == expected


class _Loaded(HTMLParser):
    """Everything that a browser fetches for a page by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.found.append(given.get("href") or "")
        if tag in ("script", "img", "iframe", "source", "video", "audio"):
            self.found.append(given.get("src") or "")


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """As `scripts/docs` does it; the pages fetch nothing from elsewhere, and nothing that is not there."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "INFO" not in line]
    assert done.returncode == 0, "\n".join(said)

    built = sorted((tmp_path / "site").rglob("*.html"))
    assert len(built) == len(list(in_nav(configured()["nav"]))) + 1  # and one for an address that does not exist
    for page in built:
        parser = _Loaded()
        text = page.read_text(encoding="utf-8")
        parser.feed(text)
        from_afar = [address for address in parser.found if re.match(r"(\w+:)?//", address)]
        assert from_afar == [], page.name
        assert 'class="mermaid"' not in text, page.name  # the theme would fetch a program to draw it
        if page.name != "404.html":  # whose addresses are those of a server
            paths = [address.split("?")[0] for address in parser.found if address and not address.startswith("data:")]
            assert [path for path in paths if not (page.parent / path).exists()] == [], page.name
