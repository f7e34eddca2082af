"""The page: a head, a tab for each tool, and the addresses of downloads; as one ASGI app of Gradio and FastAPI."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fastapi
import gradio as gr
from fastapi.responses import FileResponse, Response

from nerine.errors import OptionError
from nerine.ui.bench import SETTLED, Bench
from nerine.ui.downloads import Downloads
from nerine.ui.folders import Folders
from nerine.ui.jobs import Jobs
from nerine.ui.tabs import combine, compare, convert, inspect, merge, plan, resize, train
from nerine.version import __version__

__all__ = ["build"]

STYLE = Path(__file__).with_name("style.css")
TABS: Mapping[str, tuple[str, Callable[[Bench], None]]] = {
    "inspect": ("Inspect", inspect.build),
    "compare": ("Compare", compare.build),
    "convert": ("Convert", convert.build),
    "resize": ("Resize", resize.build),
    "combine": ("Combine", combine.build),
    "merge": ("Merge", merge.build),
    "plan": ("Plan", plan.build),
    "train": ("Train the demo", train.build),
}
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def build(folders: Folders, jobs: Jobs, max_upload: int) -> Any:
    """The app, without its guard."""
    downloads = Downloads()
    page = _page(Bench(folders, jobs, downloads, []))
    for part in page.blocks.values():
        part.async_move_resource_to_block_cache = _only_uploads(folders)
    outer = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    outer.add_api_route("/download/{key}/{name}", _download(downloads, folders), methods=["GET", "HEAD"])
    return gr.mount_gradio_app(
        outer,
        page,
        path="/",
        server_name="127.0.0.1",
        theme=_theme(),
        css_paths=[STYLE],
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=max_upload,
        allowed_paths=[],
        blocked_paths=[str(root) for root in folders.roots],
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
    )


def _page(bench: Bench) -> gr.Blocks:
    with gr.Blocks(title="nerine", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(_head(bench.folders), elem_classes="ne-head", padding=False)
        with gr.Tabs(elem_id="tabs"):
            for name, (label, lay_out) in TABS.items():
                with gr.Tab(label, id=name, elem_id=f"tab-{name}") as tab:
                    before = len(bench.pickers)
                    lay_out(bench)
                own = bench.pickers[before:]
                if own:
                    tab.select(_lists(bench, len(own)), None, own, **SETTLED)

        def left(request: gr.Request) -> None:
            bench.jobs.leave(request.session_hash or "")

        page.load(_lists(bench, len(bench.pickers)), None, bench.pickers, **SETTLED)
        page.unload(left)
    page.queue(default_concurrency_limit=None, api_open=False)
    return page


def _lists(bench: Bench, count: int) -> Callable[[], Any]:
    """What the fields that pick files are given: the files as they are now."""

    def listed() -> Any:
        found = bench.folders.listed()
        return [gr.update(choices=found)] * count if count > 1 else gr.update(choices=found)

    return listed


def _head(folders: Folders) -> str:
    roots = ", ".join(f"<code>{html.escape(str(root))}</code>" for root in folders.roots)
    return (
        f"<h1>nerine <small>{html.escape(__version__)}</small></h1>"
        f"<p>Reads and writes in {roots} and nowhere else. Nothing leaves this machine.</p>"
    )


def _theme() -> Any:
    return gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        text_size=gr.themes.sizes.text_md,
        font=FONT,
        font_mono=MONO,
    )


def _only_uploads(folders: Folders) -> Callable[[Any], Any]:
    """What Gradio does with a file that a request names: nothing, unless it was uploaded. No address is fetched."""

    async def kept(named: str | Path | None) -> str | None:
        if named is None:
            return None
        if folders.uploads is None:
            raise OptionError("Upload: there are no uploads here")
        return folders.upload(str(named))

    return kept


def _download(downloads: Downloads, folders: Folders) -> Callable[[str, str], Response]:
    def download(key: str, name: str) -> Response:
        found = downloads.get(key)
        if found is None:
            return Response("This download is no longer there; run the tool again.\n", 404, media_type="text/plain")
        called, content = found
        if isinstance(content, Path):
            try:
                file = folders.reading(str(content), "Download")
            except OptionError as error:
                return Response(f"{error}\n", 404, media_type="text/plain")
            return FileResponse(file, filename=called, media_type="application/octet-stream")
        headers = {"content-disposition": f'attachment; filename="{_ascii(called)}"'}
        return Response(content, media_type="application/octet-stream", headers=headers)

    return download


def _ascii(name: str) -> str:
    """A name within a header."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "._- ") else "_" for c in name)
