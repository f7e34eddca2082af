"""The page of a run: well-formed, self-contained, true to the history, and nothing in it is markup that was a text."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from blocky_model import adapter_of
from nerine import LoRA
from nerine.errors import MissingExtra
from nerine.train.config import parse_config, settings_of
from nerine.train.film import evenly
from nerine.train.history import History
from nerine.train.page import RunSummary, page, write_report
from nerine.train.settings import Subset
from nerine.version import __version__

Image = pytest.importorskip("PIL.Image", reason="the samples of the page need Pillow (extra: train)")

EVIL = "</title></style></pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'&<!--"
VOID = {"meta", "input", "br", "img"}


class Page(HTMLParser):
    """The elements of a page, which must be closed in the order in which they were opened."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


@pytest.fixture
def run(tmp_path: Path) -> RunSummary:
    """100 steps of a run with validations; neither pictures nor an adapter."""
    settings = settings_of(
        {
            "out": tmp_path,
            "name": "paper woman",
            "algo": "loha",
            "rank": 6,
            "steps": 100,
            "data": (Path("pictures/dog"), Path("pictures/cat")),
            "prompts": ("a dog", "a cat"),
        }
    )
    history = History(tmp_path / "history.jsonl")
    history.append({"step": 0, "validation": 0.1})  # the best of all, and no result of the training
    for step in range(1, 101):
        history.append(
            {"step": step, "loss": 0.5, "lr": 1e-4, "grad_norm": 0.25, "seconds": 1.5, "memory": 7_400_000_000}
        )
        if step % 25 == 0:
            history.append({"step": step, "validation": {25: 0.42, 50: 0.31, 75: 0.36, 100: 0.39}[step]})
    data = {"pictures": 12, "buckets": {"1024x768": 7, "768x1024": 5}, "skipped": [["a.gif", "is animated"]]}
    return RunSummary(
        settings=settings,
        history=history,
        folder=tmp_path,
        adapter=None,
        data=data,
        steps=100,
        seconds=754.2,
        layers=3,
        params=12_345,
        base="tiny",
        notes=("a note",),
    )


def draw(folder: Path, step: int, number: int, size: tuple[int, int], colour: str = "red") -> None:
    place = folder / "samples" / f"{step:06d}"
    place.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(place / f"{number:02d}.png")


def pictures_of(found: Page) -> list[Any]:
    """The pictures in a page, opened."""
    opened = []
    for one in found.all("img"):
        kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", str(one["src"])).groups()
        opened.append(Image.open(io.BytesIO(base64.b64decode(data))))
        assert opened[-1].format == kind.upper()
        assert opened[-1].size == (int(str(one["width"])), int(str(one["height"])))
    return opened


# -- the whole ---------------------------------------------------------------------------------------------------------
def test_the_verdict_says_what_came_of_it(run: RunSummary) -> None:
    found = Page(page(run))
    assert "100 steps in 12 min 34 s; loss 0.5 at the end; best validation 0.31 at step 50" in found.texts
    assert "paper woman · nerine train" in found.texts
    assert [a for a in found.all("p") if a.get("class") == "verdict"]
    for text in (
        "12,345",
        "in 3 layers",
        "7.4 GB",
        "1.5 s",
        "loha",
        "rank 6",
        "a note",
        f"Made by nerine {__version__}.",
    ):
        assert text in found.texts, text
    assert len(found.all("svg")) == 1
    assert "not finite" not in found.text


def test_a_run_that_ended_before_its_time(run: RunSummary) -> None:
    found = Page(page(replace(run, steps=400, seconds=7322.0)))
    assert any(text.startswith("100 of 400 steps in 2 h 2 min;") for text in found.texts)
    assert [a for a in found.all("p") if a.get("class") == "verdict wrong"]


def test_steps_that_were_not_finite(run: RunSummary) -> None:
    run.history.append({"step": 101, "loss": math.nan, "lr": math.inf, "grad_norm": math.nan, "seconds": 1.0})
    run.history.append({"step": 101, "validation": math.nan})
    found = Page(page(replace(run, steps=101)))
    assert any("the loss was not finite in 1 step" in text for text in found.texts)
    assert "not finite: 1 step" in found.texts
    assert [a for a in found.all("p") if a.get("class") == "verdict wrong"]
    assert not re.search(r"\b(nan|inf)\b", found.text)


def test_validations_with_the_best_of_them(run: RunSummary) -> None:
    found = Page(page(run))
    assert "It was best at step 50 (0.31) and is 0.39 at the end: " in found.text
    assert found.texts.index("before the training") < found.texts.index("best")
    run.history.append({"step": 101, "validation": 0.3, "validation_ema": 0.28})
    found = Page(page(run))
    assert "It was best at step" not in found.text
    assert "of the averaged values (EMA)" in found.texts
    assert "0.28" in found.texts


def test_a_run_without_a_single_step(run: RunSummary, tmp_path: Path) -> None:
    found = Page(page(replace(run, history=History(tmp_path / "none.jsonl"), data={}, seconds=0.0)))
    assert "0 of 100 steps in 0 s" in found.texts
    assert not found.all("svg")
    assert not {"Loss", "Validation", "Data", "Pictures on the way"} & set(found.texts)


def test_nothing_is_fetched_and_nothing_runs(run: RunSummary) -> None:
    draw(run.folder, 0, 0, (300, 200))
    html = page(run)
    found = Page(html)
    assert not {"link", "script", "iframe", "object", "base", "form"} & {tag for tag, _ in found.elements}
    assert not re.search(r"https?:|url\(|@import|//cdn", html)
    (policy,) = (a["content"] for a in found.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.split("; ") == [
        *("default-src 'none'", "style-src 'unsafe-inline'", "img-src data:", "base-uri 'none'", "form-action 'none'")
    ]


def test_texts_are_never_markup(run: RunSummary) -> None:
    draw(run.folder, 0, 0, (30, 20))
    settings = settings_of(
        {
            "name": EVIL,
            "base": EVIL,
            "prompts": (EVIL,),
            "prefix": EVIL,
            "optimizer_args": {EVIL: EVIL},
            "data": (EVIL,),
        }
    )
    settings = replace(settings, subsets=(Subset(folder=Path(EVIL), caption=EVIL),))
    data = {EVIL: EVIL, "buckets": {EVIL: EVIL}, "skipped": [(EVIL, EVIL), {EVIL: EVIL}], "notes": [EVIL]}
    html = page(replace(run, settings=settings, data=data, base=EVIL, notes=(EVIL,), adapter=Path(EVIL)))
    found = Page(html)
    assert "<script" not in html
    assert "<!--" not in html
    assert html.count("<style") == html.count("</style>") == 1
    assert html.count("<img") == len(found.all("img")) == 1
    assert found.all("img")[0]["alt"] == f"{EVIL}, step 0"
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
    assert sum(EVIL in text for text in found.texts) > 10  # it is there, to be read


# -- samples -----------------------------------------------------------------------------------------------------------
def test_samples_are_shrunk_to_what_is_shown(run: RunSummary) -> None:
    draw(run.folder, 0, 0, (1024, 512))
    draw(run.folder, 0, 1, (64, 48))
    draw(run.folder, 50, 0, (96, 128), "blue")
    found = Page(page(run))
    pictures = pictures_of(found)
    assert [one.size for one in pictures] == [(256, 128), (96, 128), (64, 48)]
    assert [one.format for one in pictures] == ["JPEG", "JPEG", "PNG"]
    assert [a.get("class") for a in found.all("img")] == [None, None, "tiny"]
    assert [a["alt"] for a in found.all("img")] == ["a dog, step 0", "a dog, step 50", "a cat, step 0"]
    red, _, blue = pictures[1].convert("RGB").getpixel((40, 60))
    assert (red < 20, blue > 235) == (True, True)
    at = [found.texts.index(text) for text in ("before", "step 50", "a dog", "a cat", "none")]
    assert at == sorted(at)


def test_few_of_many_samples(run: RunSummary) -> None:
    for step in range(0, 1100, 50):
        for number in range(10):
            draw(run.folder, step, number, (16, 12))
    found = Page(page(run))
    heads = [text for text in found.texts if re.fullmatch(r"before|step [\d,]+", text)]
    assert len(heads) == 8
    assert (heads[0], heads[-1]) == ("before", "step 1,050")
    assert len(found.all("img")) == 64
    assert "Shown are 8 of 10 prompts at 8 of 22 steps; all are in samples/." in found.text
    assert "prompt 3" in found.texts  # of which the settings know nothing


def test_a_damaged_sample_is_told(run: RunSummary) -> None:
    for step in (0, 10, 20):
        draw(run.folder, step, 0, (32, 24))
    (run.folder / "samples/000010/00.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    whole = run.folder / "samples/000020/00.png"
    whole.write_bytes(whole.read_bytes()[:60])
    (run.folder / "samples/notes").mkdir()
    (run.folder / "samples/notes/00.png").write_bytes(b"")
    found = Page(page(run))
    assert len(found.all("img")) == 1
    assert sum(text.startswith("cannot be read: ") for text in found.texts) == 2


def test_samples_need_pillow(run: RunSummary, monkeypatch: Any) -> None:
    draw(run.folder, 0, 0, (32, 24))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtra, match=r"nerine\[train\]"):
        page(run)


def test_evenly() -> None:
    assert evenly(3, 8) == [0, 1, 2]
    assert evenly(15, 8) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert evenly(100, 3) == [0, 50, 99]


# -- settings, data, the adapter ---------------------------------------------------------------------------------------
def test_settings_that_differ_come_first(run: RunSummary) -> None:
    subset = Subset(folder=Path("pictures/owl"), repeats=7)
    found = Page(page(replace(run, settings=replace(run.settings, subsets=(subset,)))))
    fold = next(i for i, text in enumerate(found.texts) if text.endswith("settings are as the defaults"))
    for name in ("adapter.algo", "adapter.rank", "output.name", "data.data"):
        assert found.texts.index(name) < fold
    for name in ("adapter.dora", "optimizer.clip", "base.base"):
        assert found.texts.index(name) > fold
    assert "pictures/dog\npictures/cat" in found.texts
    at = found.texts.index("repeats")
    assert found.texts[at - 1 : at + 2] == ["pictures/owl", "repeats", "7"]


def test_the_run_can_be_repeated_from_the_page(run: RunSummary) -> None:
    found = Page(page(run))
    assert f"nerine train {run.folder}/settings.toml --out another-folder" in found.texts
    toml = next(text for text in found.texts if text.startswith("[base]"))
    assert settings_of(parse_config(toml, "page")) == replace(
        run.settings, data=replace(run.settings.data, data=tuple(one.absolute() for one in run.settings.data.data))
    )


def test_data_with_what_was_skipped(run: RunSummary) -> None:
    texts = Page(page(run)).texts
    at = texts.index("buckets: 2")
    assert texts[at + 1 : at + 7] == ["width × height", "pictures", "1024x768", "7", "768x1024", "5"]
    at = texts.index("skipped: 1")
    assert texts[at + 1 : at + 5] == ["picture", "why", "a.gif", "is animated"]
    many = {f"{number}.png": "is damaged" for number in range(300)}
    found = Page(page(replace(run, data={"skipped": many})))
    assert "skipped: 300" in found.texts
    assert "199.png" in found.texts
    assert "200.png" not in found.texts
    assert "and 100 more, in data.json" in found.texts


def test_the_adapter_is_inspected(run: RunSummary, tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "paper woman.safetensors", LoRA(rank=2))
    texts = Page(page(replace(run, adapter=file))).texts
    assert "The adapter" in texts
    assert any(text.startswith(f"{file}. ") for text in texts)
    assert "LoRA" in texts


def test_an_adapter_that_cannot_be_inspected_is_told(run: RunSummary, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"rubbish")
    assert f"{file} could not be inspected: " in Page(page(replace(run, adapter=file))).text


# -- the files ---------------------------------------------------------------------------------------------------------
def test_the_report_is_written(run: RunSummary) -> None:
    pytest.importorskip("matplotlib", reason="the curve needs matplotlib (extra: plots)")
    file, notes = write_report(run)
    assert file == run.folder / "report.html"
    assert file.read_text(encoding="utf-8") == page(run)
    assert (run.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert notes == ("a note",)


def test_without_matplotlib_the_report_says_so(run: RunSummary, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    file, notes = write_report(run)
    assert notes[0] == "a note"
    assert notes[1].startswith("loss.png was left out: ")
    assert 'pip install "nerine[plots]"' in notes[1]
    assert notes[1] in Page(file.read_text(encoding="utf-8")).texts
    assert not (run.folder / "loss.png").exists()


def test_without_a_finite_loss_the_report_says_so(run: RunSummary, tmp_path: Path) -> None:
    history = History(tmp_path / "other.jsonl")
    history.append({"step": 1, "loss": math.nan})
    file, notes = write_report(replace(run, history=history, steps=1))
    assert notes[1:] == ("loss.png was left out: no step has a finite loss",)
    assert "1 step in 12 min 34 s; the loss was not finite in 1 step" in Page(file.read_text(encoding="utf-8")).texts


# -- in a browser ------------------------------------------------------------------------------------------------------
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PROBE = """
<script>
const told = [];
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {
  const inner = frame.contentDocument, root = inner.documentElement;
  const out = document.createElement("pre");
  out.id = "answer";
  out.textContent = JSON.stringify({
    width: root.clientWidth, scroll: Math.max(root.scrollWidth, inner.body.scrollWidth),
    shown: [...inner.images].filter((one) => one.complete && one.naturalWidth > 0).length,
    hard: frame.contentWindow.getComputedStyle(inner.images[0]).imageRendering,
  });
  document.body.append(out);
});
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
def test_a_phone_shows_it_without_scrolling_sideways(run: RunSummary) -> None:
    for step in (0, 25, 50, 75, 100):
        draw(run.folder, step, 0, (16, 12))
        draw(run.folder, step, 1, (300, 200))
    (run.folder / "report.html").write_text(page(run), encoding="utf-8")
    outer = run.folder / "frame.html"
    outer.write_text(f'<!doctype html><iframe src="report.html" style="width:390px;height:800px"></iframe>{PROBE}')
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
    ]
    done = subprocess.run(
        [str(BROWSER), *options, "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", outer.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    answer = json.loads(re.search(r'<pre id="answer">(.*?)</pre>', done.stdout).group(1))
    assert answer == {"width": answer["width"], "scroll": answer["width"], "shown": 10, "hard": "pixelated"}
    assert "Content Security Policy" not in done.stderr
