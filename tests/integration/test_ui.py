"""The web app as people use it: `nerine ui` in a process of its own, clicked through in a real Chromium.

Every page is watched: no error in its console, and no request that leaves 127.0.0.1. `NERINE_SCREENSHOTS=folder` keeps
pictures of all tabs, `NERINE_BROWSER` names another Chromium.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nerine
from nerine.algorithms import DoRA, LoHa, LoKr, LoRA
from nerine.files.store import open_file, write_file
from nerine.tools.merge import merge
from tool_adapters import adapter_of, base_of, stirred

BROWSER = os.environ.get("NERINE_BROWSER") or shutil.which("chromium")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
httpx = pytest.importorskip("httpx", reason="httpx is not installed (it comes with gradio)")
# Gradio is not imported here: it leaves event loops behind.
pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason='no gradio: pip install "nerine[ui]"')
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH, and NERINE_BROWSER names none")

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SHOTS = os.environ.get("NERINE_SCREENSHOTS")
LONG = 90_000  # milliseconds that nothing takes, even on a busy machine
MAX_UPLOAD = 300_000
MANY = 120  # layers of the file whose conversion is cancelled


# -- a server and its files --------------------------------------------------------------------------------------------
@dataclass
class Server:
    """A running `nerine ui`."""

    process: subprocess.Popen[str]
    url: str
    folder: Path
    outside: Path
    temporary: Path

    @property
    def home(self) -> str:
        return self.url.partition("/?")[0]

    @contextmanager
    def client(self) -> Iterator[Any]:
        """Somebody who has the token."""
        with httpx.Client(base_url=self.home, timeout=60) as made:
            made.get(self.url).raise_for_status()
            assert len(made.cookies) == 1
            yield made


class Wide(nn.Module):
    """Many layers, whose conversion takes a while."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(512, 640, bias=False) for _ in range(MANY))


def files_in(folder: Path) -> None:
    base_of(folder)
    adapter_of(folder / "style.safetensors", LoRA(rank=4), nn.Linear, dialect="kohya")
    adapter_of(folder / "face.safetensors", LoRA(rank=2), nn.Linear, seed=2, dialect="kohya")
    adapter_of(folder / "loha.safetensors", LoHa(rank=2), nn.Linear)
    adapter_of(folder / "dora.safetensors", DoRA(LoKr(rank=2)), nn.Linear)
    torch.manual_seed(0)
    wide = stirred(nerine.attach(Wide(), LoHa(rank=32)), size=0.1)
    nerine.save(wide, folder / "wide.safetensors", dtype=torch.float16)
    network = stirred(nerine.attach(Wide().blocks[:3], LoRA(rank=2)))
    with torch.no_grad():
        next(iter(network.parameters())).fill_(float("nan"))
    nerine.save(network, folder / "broken.safetensors")
    hostile_in(folder / "hostile")


def hostile_in(folder: Path) -> None:
    """Files that are none, or worse."""
    folder.mkdir()
    head = struct.pack("<Q", 2**60)
    (folder / "giant.safetensors").write_bytes(head + b"{}")
    whole = folder.with_name("style.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    nested = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    (folder / "bomb.safetensors").write_bytes(struct.pack("<Q", len(nested)) + nested)
    torch.save({"weight": torch.ones(2)}, folder / "pickle.safetensors")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("adapter.txt", "x" * 100)
    (folder / "zip.safetensors").write_bytes(packed.getvalue())
    (folder / "empty.safetensors").write_bytes(b"")
    name = "unet.<img src=x onerror=alert(1)>${alert(2)}{{alert(3)}}"
    shapes = {f"{name}.lora_A.weight": (2, 8), f"{name}.lora_B.weight": (6, 2)}
    write_file(folder / "names.safetensors", {key: torch.ones(shape) for key, shape in shapes.items()}, {"<b>": name})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, outside, temporary = (tmp_path_factory.mktemp(name) for name in ("models", "outside", "tmp"))
    files_in(folder)
    (outside / "secret.safetensors").write_bytes((folder / "style.safetensors").read_bytes())
    (folder / "link.safetensors").symlink_to(outside / "secret.safetensors")
    command = [sys.executable, "-m", "nerine", "ui", "--json", "--folder", str(folder), "--max-upload", str(MAX_UPLOAD)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    with (temporary / "errors.txt").open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, (temporary / "errors.txt").read_text()
    yield Server(process, json.loads(line)["url"], folder, outside, temporary)
    process.kill()
    process.wait(30)
    process.stdout.close()


# -- a browser that is watched -----------------------------------------------------------------------------------------
@dataclass
class Watched:
    """A page, and what went wrong on it."""

    page: Any
    wrong: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.page.on("console", lambda m: self.wrong.append(f"console: {m.text}") if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))

    def tab(self, label: str) -> None:
        self.page.get_by_role("tab", name=label, exact=True).click()

    def pick(self, name: str, text: str) -> None:
        """Type into a field that picks a file or one of several words."""
        box = self.page.locator(f"#{name} input").first
        box.click()
        box.fill(text)
        box.press("Enter")
        box.blur()

    def choose(self, name: str, text: str) -> None:
        """One of the words of a list."""
        self.page.locator(f"#{name} input").first.click()
        self.page.locator(f"#{name}").get_by_role("option", name=text, exact=True).click()

    def write(self, name: str, text: str) -> None:
        self.page.locator(f"#{name} textarea, #{name} input").first.fill(text)

    def proposed(self, name: str, text: str) -> None:
        """Wait until the page has proposed this name to write to."""
        place = self.page.locator(f"#{name}-out textarea, #{name}-out input").first
        sync_api.expect(place).to_have_value(text)

    def run(self, name: str) -> str:
        """Click, wait for the end, and read the result."""
        self.page.evaluate(f"document.querySelectorAll('#{name}-result .prose > *').forEach(e => e.className = 'old')")
        self.page.click(f"#{name}-run")
        sync_api.expect(self.page.locator(f"#{name}-result .old")).to_have_count(0, timeout=LONG)
        return self.ended(name)

    def ended(self, name: str, timeout: float = LONG) -> str:
        """Wait for the end of what runs, and read the result."""
        sync_api.expect(self.page.locator(f"#{name}-run")).to_be_enabled(timeout=timeout)
        sync_api.expect(self.page.locator(f"#{name}-cancel")).to_be_disabled(timeout=timeout)
        return str(self.page.locator(f"#{name}-result").inner_text())

    def shoot(self, name: str) -> None:
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            self.page.wait_for_timeout(300)
            self.page.screenshot(path=f"{SHOTS}/{name}.png")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield opened
        opened.close()


def open_page(browser: Any, server: Server, width: int = 1280, height: int = 900) -> Watched:
    """The page, where everything but this machine is cut off."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="light")
    watched = Watched(context.new_page())

    def route(route: Any) -> None:
        if route.request.url.startswith((f"{server.home}/", "data:", "blob:")):
            route.continue_()
        else:
            watched.wrong.append(f"request: {route.request.url}")
            route.abort()

    context.route("**/*", route)
    watched.watch()
    watched.page.goto(server.url)
    watched.page.locator("#inspect-run").wait_for(timeout=LONG)
    return watched


@pytest.fixture(scope="module")
def opened(browser: Any, server: Server) -> Watched:
    return open_page(browser, server)


@pytest.fixture
def page(opened: Watched) -> Iterator[Watched]:
    opened.wrong.clear()
    yield opened
    assert opened.wrong == []


# -- click through -----------------------------------------------------------------------------------------------------
@needs_browser
def test_the_token_is_gone_from_the_address(page: Watched, server: Server) -> None:
    assert page.page.url == f"{server.home}/"
    assert page.page.evaluate("document.cookie") == ""
    assert str(server.folder) in page.page.locator(".ne-head").first.inner_text()
    page.shoot("home")


@needs_browser
def test_inspect(page: Watched) -> None:
    page.tab("Inspect")
    page.pick("inspect-file", "dora.safetensors")
    text = page.run("inspect")
    assert "no layer looks suspicious" in text
    assert "DoRA(LoKr)" in text
    page.shoot("inspect")
    frame = page.page.frame_locator(".ne-frame")
    assert frame.locator("h1").inner_text() == "dora.safetensors"
    with page.page.expect_download() as waited:
        page.page.get_by_role("link", name="Download as one HTML file").click()
    assert waited.value.suggested_filename == "dora.html"
    assert "<!doctype html>" in Path(waited.value.path()).read_text(encoding="utf-8").lower()
    page.pick("inspect-file", "broken.safetensors")
    text = page.run("inspect")
    assert "1 of 3 layers look suspicious" in text
    assert "not finite" in text


@needs_browser
def test_a_dropped_file_is_looked_at_at_once(page: Watched, server: Server) -> None:
    page.tab("Inspect")
    page.page.locator("#inspect-drop input[type=file]").set_input_files(str(server.folder / "loha.safetensors"))
    page.page.locator("#inspect-result").get_by_text("loha.safetensors: no layer").wait_for(timeout=LONG)
    held = list(server.temporary.glob("nerine-ui-*/**/*.safetensors"))
    assert [path.name for path in held] == ["loha.safetensors"]


@needs_browser
def test_compare(page: Watched) -> None:
    page.tab("Compare")
    page.pick("compare-a", "style.safetensors")
    page.pick("compare-b", "face.safetensors")
    text = page.run("compare")
    assert "A is style.safetensors, B is face.safetensors" in text
    assert page.page.locator("#compare-result img.ne-plot").count() == 1
    page.shoot("compare")
    page.pick("compare-b", "style.safetensors")
    assert "byte for byte" in page.run("compare")


@needs_browser
def test_convert(page: Watched, server: Server) -> None:
    page.tab("Convert")
    page.pick("convert-file", "loha.safetensors")
    page.choose("convert-to", "lora")
    page.choose("convert-dialect", "kohya")
    page.proposed("convert", "loha-converted.safetensors")
    text = page.run("convert")
    assert "Written: loha-converted.safetensors" in text
    assert "Which programs read this file" in text
    assert "ComfyUI" in text
    page.shoot("convert")
    written = server.folder / "loha-converted.safetensors"
    with open_file(written) as source:
        assert any(key.endswith("lora_down.weight") for key in source.keys)
    with page.page.expect_download() as waited:
        page.page.locator("#convert-result").get_by_role("link", name="Download").click()
    assert Path(waited.value.path()).read_bytes() == written.read_bytes()
    before = written.read_bytes()
    assert 'there already; choose another name, or tick "Replace"' in page.run("convert")
    assert written.read_bytes() == before
    page.page.locator("#convert-replace input").check()
    assert "Written" in page.run("convert")


@needs_browser
def test_a_running_job_can_be_cancelled_and_leaves_nothing(page: Watched, server: Server) -> None:
    page.tab("Convert")
    before = {path: path.stat().st_mtime_ns for path in server.folder.rglob("*")}
    page.pick("convert-file", "wide.safetensors")
    page.choose("convert-to", "lora")
    page.choose("convert-dialect", "as it is")
    page.page.get_by_role("button", name="More settings").locator("visible=true").click()
    page.write("convert-rank", "3")
    page.write("convert-out", "never.safetensors")
    page.page.click("#convert-run")
    page.page.locator("#convert-result").get_by_text(re.compile(rf"of {MANY}")).wait_for(timeout=LONG)
    page.shoot("progress")
    sync_api.expect(page.page.locator("#convert-run")).to_be_disabled()
    page.tab("Plan")  # the page does not freeze meanwhile
    page.tab("Convert")
    page.page.click("#convert-cancel")
    assert "Cancelled." in page.ended("convert")
    assert {path: path.stat().st_mtime_ns for path in server.folder.rglob("*")} == before
    sync_api.expect(page.page.locator("#convert-run")).to_be_enabled()


@needs_browser
@pytest.mark.slow
def test_a_page_that_is_closed_takes_its_job_along(page: Watched, browser: Any, server: Server) -> None:
    other = open_page(browser, server)
    other.tab("Convert")
    other.pick("convert-file", "wide.safetensors")
    other.choose("convert-to", "lora")
    other.page.get_by_role("button", name="More settings").locator("visible=true").click()
    other.write("convert-rank", "3")
    other.proposed("convert", "wide-converted.safetensors")
    other.page.click("#convert-run")
    other.page.locator("#convert-result").get_by_text(re.compile(rf"of {MANY}")).wait_for(timeout=LONG)
    other.page.context.close()
    assert other.wrong == []
    page.page.reload()
    page.tab("Convert")  # its turn comes when the other has ended, one way or the other
    page.pick("convert-file", "loha.safetensors")
    page.choose("convert-to", "lora")
    page.proposed("convert", "loha-converted.safetensors")
    page.write("convert-out", "next.safetensors")
    assert "Written: next.safetensors" in page.run("convert")
    assert not (server.folder / "wide-converted.safetensors").exists()


@needs_browser
def test_resize(page: Watched, server: Server) -> None:
    page.tab("Resize")
    page.pick("resize-file", "style.safetensors")
    page.write("resize-rank", "2")
    page.proposed("resize", "style-smaller.safetensors")
    page.write("resize-out", "small.safetensors")
    text = page.run("resize")
    assert "Written: small.safetensors" in text
    assert "energy kept" in text.lower()
    page.shoot("resize")
    assert (server.folder / "small.safetensors").stat().st_size < (server.folder / "style.safetensors").stat().st_size
    page.write("resize-rank", "many")
    page.write("resize-out", "other.safetensors")
    assert "Rank: expected a whole number, found many" in page.run("resize")


@needs_browser
def test_combine(page: Watched, server: Server) -> None:
    page.tab("Combine")
    page.pick("combine-file-1", "style.safetensors")
    page.proposed("combine", "style-combined.safetensors")
    assert "choose 2 adapters at least, found 1" in page.run("combine")
    page.pick("combine-file-2", "face.safetensors")
    page.write("combine-strength-2", "0.5")
    page.page.click("#combine-more")
    page.page.locator("#combine-file-3").wait_for()
    text = page.run("combine")
    assert "Written: style-combined.safetensors" in text
    page.shoot("combine")
    with open_file(server.folder / "style-combined.safetensors") as source:
        ranks = {source.shape(key)[0] for key in source.keys if key.endswith("lora_down.weight")}
    assert ranks == {6}


@needs_browser
def test_merge(page: Watched, server: Server) -> None:
    page.tab("Merge")
    page.pick("merge-base", "base.safetensors")
    page.proposed("merge", "base-merged.safetensors")
    page.pick("merge-file-1", "dora.safetensors")
    page.write("merge-strength-1", "0.8")
    text = page.run("merge")
    assert "Written: base-merged.safetensors" in text
    assert "as promised" in text
    page.shoot("merge")
    expected = server.folder / "expected.safetensors"
    merge(server.folder / "base.safetensors", [(server.folder / "dora.safetensors", 0.8)], expected)
    assert (server.folder / "base-merged.safetensors").read_bytes() == expected.read_bytes()
    page.pick("merge-base", "face.safetensors")
    page.write("merge-out", "another.safetensors")
    assert "found an adapter" in page.run("merge")


@needs_browser
def test_plan(page: Watched) -> None:
    page.tab("Plan")
    page.choose("plan-algorithm", "lokr")
    page.write("plan-rank", "4")
    text = page.run("plan")
    assert "on the tiny model" in text
    assert "83" in text
    page.shoot("plan")
    page.choose("plan-algorithm", "ia3")
    sync_api.expect(page.page.locator("#plan-rank textarea, #plan-rank input").first).to_have_value("")
    assert "IA3" in page.run("plan")
    page.page.get_by_label("a checkpoint of mine").check()
    page.pick("plan-file", "base.safetensors")
    assert "base.safetensors" in page.run("plan")


@needs_browser
@pytest.mark.slow
def test_train_the_demo(page: Watched, server: Server) -> None:
    page.tab("Train the demo")
    page.page.locator("#train-steps input[type=number]").fill("200")
    page.page.locator("#train-every input[type=number]").fill("5")
    page.page.click("#train-run")
    film = page.page.locator("#train-result .ne-film figure")
    film.nth(2).wait_for(timeout=6 * LONG)
    page.shoot("train-live")
    assert page.page.locator("#train-result img[alt^='Loss over']").count() == 1
    page.page.click("#train-stop")
    text = page.ended("train", 6 * LONG)
    assert "trained = merged" in text
    assert "neon-dora-lokr.safetensors" in text
    page.shoot("train")
    assert (server.folder / "nerine-demo/neon-dora-lokr.safetensors").is_file()
    assert "tick Replace" in page.run("train")


@needs_browser
def test_a_phone_shows_it_without_scrolling_sideways(browser: Any, server: Server) -> None:
    watched = open_page(browser, server, 390, 844)
    watched.pick("inspect-file", "dora.safetensors")
    watched.run("inspect")
    watched.page.screenshot(path=f"{SHOTS}/phone.png") if SHOTS else None
    width = watched.page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)")
    watched.page.context.close()
    assert width <= 390
    assert watched.wrong == []


# -- hostile -----------------------------------------------------------------------------------------------------------
@needs_browser
@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("giant", "header of 1,152,921,504,606,846,976 bytes"),
        ("truncated", "not a whole safetensors file"),
        ("bomb", "nested too deeply"),
        ("pickle", "pickle"),
        ("zip", "hostile/zip.safetensors"),
        ("empty", "it ends after 0 bytes"),
    ],
)
def test_a_hostile_file_is_one_paragraph_and_the_page_goes_on(page: Watched, file: str, words: str) -> None:
    page.tab("Inspect")
    page.pick("inspect-file", f"hostile/{file}.safetensors")
    text = page.run("inspect")
    assert words in text
    assert "Traceback" not in text
    assert page.page.locator("#inspect-result img").count() == 0
    page.shoot(f"hostile-{file}")


@needs_browser
def test_names_in_a_file_are_text_whatever_they_spell(page: Watched) -> None:
    page.tab("Inspect")
    page.pick("inspect-file", "hostile/names.safetensors")
    text = page.run("inspect")
    assert "<img src=x onerror=alert(1)>${alert(2)}{{alert(3)}}" in text
    assert page.page.locator("#inspect-result img[src=x]").count() == 0
    assert page.page.frame_locator(".ne-frame").locator("img").count() == 0


@needs_browser
@pytest.mark.parametrize("text", ["../outside/secret.safetensors", "/etc/passwd", "link.safetensors", "{outside}"])
def test_paths_that_lead_outside_are_refused(page: Watched, server: Server, text: str) -> None:
    page.tab("Inspect")
    page.pick("inspect-file", text.format(outside=server.outside / "secret.safetensors"))
    assert "leads outside of the folders" in page.run("inspect")
    page.page.reload()  # with empty fields: picking suggests a name a moment later, which is waited for
    page.tab("Resize")
    page.pick("resize-file", "style.safetensors")
    page.proposed("resize", "style-smaller.safetensors")
    page.write("resize-rank", "2")
    page.write("resize-out", text.format(outside=server.outside / "new.safetensors"))
    page.page.locator("#resize-replace input").check()
    assert "leads outside of the folders" in page.run("resize")
    assert [path.name for path in server.outside.iterdir()] == ["secret.safetensors"]


def test_strangers_get_one_sentence(server: Server) -> None:
    for path in ("/", "/config", "/gradio_api/queue/data?session_hash=x", "/gradio_api/file=/etc/passwd"):
        answer = httpx.get(server.home + path)
        assert (answer.status_code, answer.text.count("\n")) == (401, 1)
    assert httpx.get(server.home + "/?token=wrong").status_code == 401
    with server.client() as client:
        assert client.get("/", headers={"host": "evil.example"}).status_code == 403
        foreign = {"origin": "http://evil.example"}
        assert client.post("/gradio_api/queue/join", json={}, headers=foreign).status_code == 403


def test_no_file_is_served_but_what_was_written(server: Server) -> None:
    with server.client() as client:
        for name in (
            "/etc/passwd",
            "../../../../etc/passwd",
            str(server.folder / "style.safetensors"),
            "pyproject.toml",
        ):
            for lead in (
                "/gradio_api/file=",
                "/file=",
                "/file/",
                "/gradio_api/file/",
                "/static/",
                "/assets/",
                "/download/",
            ):
                assert client.get(lead + name).status_code in (403, 404), lead + name
        assert client.get("/download/guess/x").status_code == 404
        assert client.get("/gradio_api/proxy=http://127.0.0.1:1/").status_code == 404


def test_uploads_are_bounded_and_kept_where_they_are_removed(server: Server) -> None:
    with server.client() as client:
        too_large = {"files": ("big.safetensors", b"\0" * (MAX_UPLOAD + 2**17))}
        assert client.post("/gradio_api/upload", files=too_large).status_code == 413
        nearly = {"files": ("near.safetensors", b"\0" * (MAX_UPLOAD + 1))}
        assert client.post("/gradio_api/upload", files=nearly).status_code == 413
        evil = {"files": ("../../../evil.safetensors", b"\0" * 10)}
        (held,) = client.post("/gradio_api/upload", files=evil).json()
    uploads = next(server.temporary.glob("nerine-ui-*"))
    assert uploads in Path(held).parents
    assert Path(held).read_bytes() == b"\0" * 10
    assert not list(server.temporary.rglob("big*")) + list(server.temporary.rglob("near*"))
    assert not list(server.temporary.rglob("../evil.safetensors"))


def test_a_request_cannot_pass_a_file_off_as_an_upload(server: Server) -> None:
    """What Gradio would copy into its own folder, and so make readable, or fetch."""
    with server.client() as client:
        config = client.get("/config").json()
        kinds = {part["id"]: part["type"] for part in config["components"]}
        ids = [d["id"] for d in config["dependencies"] if [kinds[i] for i in d["inputs"]] == ["uploadbutton"]]
        assert ids
        for path in ("/etc/passwd", str(server.outside / "secret.safetensors"), "http://127.0.0.1:1/x.safetensors"):
            data = [{"path": path, "orig_name": "x.safetensors", "meta": {"_type": "gradio.FileData"}}]
            body = {"data": data, "fn_index": ids[0], "session_hash": "abc", "event_data": None, "trigger_id": 1}
            assert client.post("/gradio_api/queue/join", json=body).status_code == 200
            said = client.get("/gradio_api/queue/data", params={"session_hash": "abc"}).text
            assert '"success":false' in said.replace(" ", "")
    names = {path.name for path in next(server.temporary.glob("nerine-ui-*")).rglob("*")}
    assert not names & {"passwd", "secret.safetensors", "x.safetensors"}


def test_it_ends_on_request_and_takes_the_uploads_along(server: Server) -> None:
    """The last one: nothing of the above is there after it."""
    assert server.process.poll() is None
    assert list(server.temporary.glob("nerine-ui-*"))
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    end = time.monotonic() + 10
    while list(server.temporary.glob("nerine-ui-*")) and time.monotonic() < end:
        time.sleep(0.1)
    assert not list(server.temporary.glob("nerine-ui-*"))
    told = (server.temporary / "errors.txt").read_text()
    assert "ASGI" not in told
    assert set(re.findall(r"^(\S*Error)\b", told, re.MULTILINE)) <= {
        "nerine.errors.OptionError"
    }  # of the forged uploads
