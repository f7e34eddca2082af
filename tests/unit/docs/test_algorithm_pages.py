"""The pages of the algorithms are those that the code makes now, and every algorithm has one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nerine.algorithms import REGISTRY

pytestmark = pytest.mark.no_device_guard  # shapes are taken on `meta` beside real weights

Generator = Callable[[str], ModuleType]
DOCS = Path(__file__).parents[3] / "docs"
AGAIN = "run `scripts/docs --generate`"


@pytest.fixture(scope="module")
def pages(generator: Generator) -> dict[str, str]:
    found: dict[str, str] = generator("algorithms").pages()
    return found


def test_the_pages_are_up_to_date(pages: dict[str, str]) -> None:
    written = {name: (DOCS / name).read_bytes() if (DOCS / name).exists() else b"" for name in pages}
    stale = [name for name, text in pages.items() if written[name] != text.encode()]
    assert stale == [], f"{AGAIN}: these pages are not what the code makes"


def test_nothing_else_lies_beside_them(pages: dict[str, str]) -> None:
    there = {
        file.relative_to(DOCS).as_posix()
        for folder in ("algorithms", "images/algorithms")
        for file in (DOCS / folder).iterdir()
    }
    assert there - set(pages) == set(), f"no algorithm makes these: delete them, then {AGAIN}"


def test_every_algorithm_has_a_page(pages: dict[str, str]) -> None:
    assert {f"algorithms/{name}.md" for name in (*REGISTRY, "dora", "index")} == {p for p in pages if p.endswith(".md")}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda prose: prose.pop("lokr"), "no table for ['lokr']"),
        (lambda prose: prose.update(lokrr=prose["lokr"]), "tables of no algorithm: ['lokrr']"),
    ],
)
def test_words_and_algorithms_belong_together(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any], words: str
) -> None:
    module = generator("entries")
    prose = module.read_prose()
    change(prose)
    monkeypatch.setattr(module, "read_prose", lambda: prose)
    with pytest.raises(ValueError, match=re.escape(words)):
        module.entries()


def test_every_setting_has_a_meaning(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    module = generator("entries")
    prose = module.read_prose()
    del prose["lokr"]["settings"]["factor"]
    prose["lokr"]["settings"]["factors"] = "a misspelt one"
    monkeypatch.setattr(module, "read_prose", lambda: prose)
    with pytest.raises(ValueError, match=r"lokr: no meaning for \['factor'\]; no such setting: \['factors'\]"):
        module.meanings(module.entries()["lokr"])


def test_the_formulas_are_those_of_the_code(generator: Generator) -> None:
    """Letter by letter what the docstring of the class says."""
    found = generator("entries").entries().values()
    assert [e.name for e in found if e.formula not in " ".join((e.cls.__doc__ or "").split())] == []


def test_the_figures_recorded_for_an_algorithm_are_on_its_page(generator: Generator) -> None:
    """A row of the benchmarks that a page names exists, and a row of the benchmarks has a page."""
    facts, found = generator("facts"), generator("entries").entries().values()
    assert [row for e in found for row in e.quality if facts.quality(row) is None] == []
    assert [row for e in found for row in e.performance if not facts.step_ratios(row)] == []
    recorded = facts._results("quality")["rows"]
    assert set(recorded) - {row for e in found for row in e.quality} == set()


def test_the_tables_have_the_right_numbers(pages: dict[str, str]) -> None:
    """Worked out by hand for rank 16 on Linear 320 → 640 and Conv2d 320 → 640, 3×3."""
    lora = pages["algorithms/lora.md"]
    linear, conv = 16 * (320 + 640), 16 * (320 * 9 + 640)
    assert f"| Linear 320 → 640 | {linear:,} | 1.00 | {linear / (320 * 640):.1%} | factored |" in lora
    assert f"| Conv2d 320 → 640, 3×3 | {conv:,} | 1.00 |" in lora
    assert "| `lora_down.weight` | `rank\u00a0in\u00a0*k` | uniform | 16\u00a0×\u00a0320 |" in lora
    assert "| PEFT | no | exactly (`peft`) |" in pages["algorithms/ia3.md"]  # outputs, inputs
    assert (
        "| `dora_scale` | `out\u00a01\u00a0*1` | from the weight | 640\u00a0×\u00a01 |" in pages["algorithms/dora.md"]
    )


def test_a_picture_shows_every_trained_tensor(generator: Generator) -> None:
    entries, pictures = generator("entries").entries(), generator("pictures")
    lora = pictures.draw(entries["lora"])
    assert lora.count('class="trained"') == 2 + 1  # up, down, and the legend
    assert lora.count('class="frozen"') == 1 + 1
    with_less = entries["lora"].__class__(**{**vars(entries["lora"]), "picture": ("W", "+", "up")})
    with pytest.raises(ValueError, match=r"lora: the picture leaves out \['down'\]"):
        pictures.draw(with_less)


def test_pictures_are_drawn_to_scale(generator: Generator) -> None:
    pictures = generator("pictures")
    w, _, up, _, down = pictures.boxes(generator("entries").entries()["lora"])
    assert (w.height, w.height) == (pictures.HEIGHT, up.height)  # 640 outputs
    assert w.width == down.width == round(pictures.HEIGHT * (320 / 640) ** 0.5, 1)
    assert up.width == down.height == round(pictures.HEIGHT * (16 / 640) ** 0.5, 1)
    assert (w.axes, up.axes, down.axes) == ("640 × 320", "640 × 16", "16 × 320")
