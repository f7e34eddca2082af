"""The page of an inspection: well-formed, self-contained, nothing from a file is markup; and in a browser, where one is
found, without errors, with its pictures, and no wider than a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from blocky_model import adapter_of, base_of
from nerine import DoRA, LoKr, LoRA
from nerine.tools.inspect import Finding, InspectReport, Tag, inspect
from nerine.tools.pages import page
from nerine.tools.pages.marks import Markup, mark, words
from nerine.tools.pages.scales import Scale, linear, logarithmic, quantile
from sdxl_adapter import write_sdxl

EVIL = "</title></style></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&<!--"
VOID = {"meta", "input", "br"}


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


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> InspectReport:
    file = tmp_path_factory.mktemp("sdxl") / "style.safetensors"
    write_sdxl(file, narrower=16, rank=8)
    return inspect(file)


def hostile(sdxl: InspectReport) -> InspectReport:
    """Every text that can come from a file is an attack."""
    training = replace(
        sdxl.training,
        groups={**sdxl.training.groups, "about": {"title": EVIL}, EVIL: {EVIL: EVIL}},
        tags=(Tag(EVIL, 3),),
        triggers=(EVIL,),
        notes=(EVIL,),
    )
    rows = tuple(
        replace(row, layer=EVIL, block=EVIL, kind=EVIL, algorithm=EVIL, dtype=EVIL, note=EVIL) if i < 40 else row
        for i, row in enumerate(sdxl.rows)
    )
    return replace(
        sdxl,
        file=EVIL,
        rows=rows,
        findings=(Finding(EVIL, EVIL, EVIL),),
        unmatched={EVIL: EVIL},
        embeddings={EVIL: {EVIL: (4, 768)}},
        metadata={EVIL: EVIL},
        settings=(EVIL,),
        written_by=EVIL,
        missing=(EVIL,),
        notes=(EVIL,),
        dialect=EVIL,
        base=EVIL,
        training=training,
    )


def test_the_page_is_whole(sdxl: InspectReport) -> None:
    found = Page(page(sdxl))
    assert found.all("html") == [{"lang": "en"}]
    assert "Paper Woman XL · nerine" in found.texts
    assert len(found.all("tr")) == 1 + len(sdxl.rows)
    assert [text for text in found.texts if text == "No suspicious layers"]
    pictures = found.all("svg")
    assert len(pictures) == 4
    assert all(one["role"] == "img" and one["aria-label"] for one in pictures)
    heads = [a for a in found.all("th") if a.get("scope") == "col"]
    assert len(heads) == len([a for a in found.all("th") if "scope" in a]) - len(sdxl.rows)
    assert found.all("caption")
    scrolled = [a for a in found.all("div") if a.get("class") in ("scroll", "tall")]
    assert scrolled
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in scrolled)
    assert len(page(sdxl)) < 600_000


def test_nothing_is_fetched(sdxl: InspectReport) -> None:
    html = page(sdxl)
    found = Page(html)
    assert not {"link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in found.elements}
    assert not re.search(r"https?:|url\(|@import|//cdn", html)
    (policy,) = (a["content"] for a in found.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy


def test_texts_of_a_file_are_never_markup(sdxl: InspectReport) -> None:
    html = page(hostile(sdxl))
    found = Page(html)
    assert html.count("<script") == html.count("</script>") == 1  # the page's own
    assert html.count("<style") == html.count("</style>") == 1
    assert "<img" not in html
    assert "<!--" not in html
    names = {name for _, attributes in found.elements for name in attributes}
    assert not [name for name in names if name.startswith("on")]
    assert any(EVIL in text for text in found.texts)  # it is there, to be read
    assert "Suspicious layers" in found.texts


def test_a_title_of_ones_own(sdxl: InspectReport) -> None:
    assert "<h1>Mine &lt;3</h1>" in page(sdxl, "Mine <3")


@pytest.mark.parametrize("has_base", [False, True])
def test_small_and_odd_files(has_base: bool, tmp_path: Path) -> None:
    base = base_of(tmp_path) if has_base else None
    for number, (algorithm, targets) in enumerate(
        [(LoRA(rank=2), ["conv_in"]), (DoRA(LoKr(rank=2, factor=4)), ["*attn1*"]), (LoRA(rank=2), ["*to_q"])]
    ):
        file = adapter_of(
            tmp_path / f"{number}.safetensors", algorithm, targets=targets, size=0.0 if number == 2 else 0.2
        )
        Page(page(inspect(file, base=base)))
    report = inspect(file, base=base)
    assert not report.healthy  # all of it is dead
    assert "dead" in page(report)


def test_a_file_without_layers(sdxl: InspectReport) -> None:
    Page(page(replace(sdxl, rows=())))


def test_markup() -> None:
    assert mark("p", "a<b", class_="x", hidden=True, title=None, aria_label='"') == (
        '<p class="x" hidden aria-label="&quot;">a&lt;b</p>'
    )
    assert mark("p", mark("b", "x")) == "<p><b>x</b></p>"
    assert mark("meta", name="a") == '<meta name="a">'
    assert mark("line", x1=1.23456789) == '<line x1="1.23457"></line>'
    assert isinstance(words("x"), Markup)
    assert words("\x1b\u202e<") == "\\x1b\\x202e&lt;"


def test_scales() -> None:
    scale = linear(0, 150, 0, 300)
    assert (scale(75), scale(-5), scale(500)) == (150, 0, 300)
    assert scale.ticks == [0, 50, 100, 150]
    log = logarithmic([0.01, 1.0, 2.0, 3.0], 0, 10)
    assert 0 <= log(0.01) < log(1.0) < log(3.0) <= 10
    assert log(0.0) == 0
    assert Scale(0.001, 10, 0, 1, True).ticks == [0.001, 0.01, 0.1, 1, 10]
    strays = logarithmic([1.0] * 50 + [1e9, 1e-9], 0, 10)
    assert strays.high < 1e3
    assert strays.low > 1e-3
    assert quantile([3, 1, 2], 0.5) == 2


# -- in a browser ------------------------------------------------------------------------------------------------------
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
PROBE = """
<script>
const told = [];
window.addEventListener("error", (e) => told.push(e.message));
window.addEventListener("securitypolicyviolation", (e) => told.push(e.violatedDirective));
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {
  const inner = frame.contentDocument, root = inner.documentElement;
  const heads = [...inner.querySelectorAll("#layers thead th")];
  const norm = heads.findIndex((h) => h.textContent === "norm");
  const rows = () => [...inner.querySelectorAll("#layers tbody tr")];
  heads[norm].querySelector("button").click();
  const sorted = rows().slice(0, 5).map((r) => parseFloat(r.cells[norm].textContent));
  const sort = heads[norm].getAttribute("aria-sort");
  const find = inner.getElementById("find");
  find.value = "middle_block.1";
  find.dispatchEvent(new frame.contentWindow.Event("input"));
  const shown = rows().filter((r) => !r.hidden).length;
  const answer = {
    width: root.clientWidth, scroll: root.scrollWidth, body: inner.body.scrollWidth,
    pictures: inner.querySelectorAll("svg").length, fields: inner.querySelectorAll("rect.cell").length,
    dots: inner.querySelectorAll("circle").length, sorted, sort, shown,
    status: inner.getElementById("found").textContent,
    colour: frame.contentWindow.getComputedStyle(inner.body).backgroundColor, told,
  };
  const out = document.createElement("pre");
  out.id = "answer";
  out.textContent = JSON.stringify(answer);
  document.body.append(out);
});
</script>
"""


def in_browser(file: Path, width: int, *options: str) -> tuple[dict, str]:
    """What a browser makes of the page in a frame of that width, and what it writes into its log."""
    outer = file.with_name(f"frame{width}.html")
    outer.write_text(f'<!doctype html><iframe src="{file.name}" style="width:{width}px;height:900px"></iframe>{PROBE}')
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--allow-file-access-from-files",
            "--enable-logging=stderr",
            "--virtual-time-budget=5000",
            *options,
            "--dump-dom",
            outer.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r'<pre id="answer">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:]
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")), console


@needs_browser
@pytest.mark.parametrize("width", [360, 390, 1280])
@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_in_a_browser(sdxl: InspectReport, width: int, scheme: int, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(page(sdxl), encoding="utf-8")
    found, console = in_browser(file, width, f"--blink-settings=preferredColorScheme={scheme}")
    assert console == ""
    assert found["told"] == []
    assert found["width"] == width or found["width"] == width - 15  # without the bar for scrolling
    assert found["scroll"] <= found["width"]
    assert found["body"] <= found["width"]
    assert (found["pictures"], found["dots"]) == (4, 794)
    assert found["fields"] == len({(row.block, row.kind) for row in sdxl.rows if row.block})
    assert found["sort"] == "descending"
    assert found["sorted"] == sorted(found["sorted"], reverse=True)
    assert found["shown"] == 102
    assert found["status"] == "102 of 794 layers"
    red = int(found["colour"].removeprefix("rgb(").split(",")[0])
    assert (red < 60) == (scheme == 0)


@needs_browser
def test_an_attack_does_nothing_in_a_browser(sdxl: InspectReport, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(page(hostile(sdxl)), encoding="utf-8")
    found, console = in_browser(file, 390)
    assert console == ""
    assert found["told"] == []
    assert found["scroll"] <= found["width"]


@needs_browser
def test_several_parts_of_a_pipeline_fit_a_phone(sdxl: InspectReport, tmp_path: Path) -> None:
    rows = tuple(
        replace(row, component=f"text_encoder{'_2' if i % 2 else ''}", block=f"encoder.layers.{i // 20}")
        if i < 200
        else row
        for i, row in enumerate(sdxl.rows)
    )
    file = tmp_path / "page.html"
    file.write_text(page(replace(sdxl, rows=rows)), encoding="utf-8")
    found, console = in_browser(file, 360)
    assert console == ""
    assert found["pictures"] == 6  # a map for each part
    assert max(found["scroll"], found["body"]) <= found["width"]
