"""What every tab is built from: fields to pick files, buttons, and the way from a click through a job to its result."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from nerine.errors import OptionError, shown
from nerine.tools.pages.marks import Markup, mark
from nerine.ui.downloads import Downloads
from nerine.ui.folders import Folders
from nerine.ui.jobs import Job, Jobs
from nerine.ui.panels import error_panel, hint, linked, progress_panel, verdict

__all__ = ["Bench", "Buttons", "Output", "chosen_dtype", "decimal", "devices", "number_field", "whole"]

LOOK = 0.15  # seconds between looks at a running job
SETTLED: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": True}
DTYPES = {"as it is": None, "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class Buttons(NamedTuple):
    """What starts a job, and what ends it: `stop` with what it has by then, where there is such a thing."""

    run: gr.Button
    cancel: gr.Button
    stop: gr.Button | None = None


class Output(NamedTuple):
    """Where to write, and whether over what is there."""

    place: gr.Textbox
    replace: gr.Checkbox


@dataclass(frozen=True)
class Bench:
    """What the tabs of one server share. `pickers` are the fields whose lists are read anew when a tab is opened."""

    folders: Folders
    jobs: Jobs
    downloads: Downloads
    pickers: list[gr.Dropdown]

    # -- fields --------------------------------------------------------------------------------------------------------
    def file(self, label: str, name: str, info: str | None = None, upload: bool = True) -> gr.Dropdown:
        """A file of the folders, typed, picked, or uploaded."""
        with gr.Group(), gr.Row(equal_height=True, elem_classes="ne-pick"):
            box = gr.Dropdown(
                choices=self.folders.listed(),
                value=None,
                label=label,
                info=info,
                allow_custom_value=True,
                elem_id=name,
                scale=5,
                min_width=180,
            )
            if upload:
                button = gr.UploadButton(
                    "Upload", file_types=[".safetensors"], size="sm", scale=0, min_width=84, elem_id=f"{name}-upload"
                )
                button.upload(self.received, [button], [box], **SETTLED)
        self.pickers.append(box)
        return box

    def received(self, path: str | None) -> Any:
        """An upload, put on the list and chosen."""
        if not path:
            return gr.update()
        held = self.folders.uploaded(path)
        return gr.update(choices=self.folders.listed(), value=held)

    def output(self, name: str, ending: str, sources: Sequence[gr.Dropdown]) -> Output:
        """Where a tab writes; a name is proposed when the first file is chosen."""
        place = gr.Textbox(
            label="Write to",
            placeholder=f"name{ending}.safetensors",
            info=f"In {self.folders.roots[0]}, or an absolute path in one of the folders",
            elem_id=f"{name}-out",
            max_length=4096,
        )
        replace = gr.Checkbox(label="Replace the file if it is there", value=False, elem_id=f"{name}-replace")

        def propose(file: str | None, written: str) -> Any:
            if not file or (written and not written.endswith(f"{ending}.safetensors")):
                return gr.update()  # what the user wrote stays
            stem = Path(file).name.removesuffix(".json").removesuffix(".index").removesuffix(".safetensors")
            return f"{stem}{ending}.safetensors"

        sources[0].change(propose, [sources[0], place], [place], **SETTLED)
        return Output(place, replace)

    def buttons(self, name: str, verb: str, stop: str = "") -> Buttons:
        """The buttons of a tab."""
        with gr.Row(elem_classes="ne-buttons"):
            run = gr.Button(verb, variant="primary", size="md", elem_id=f"{name}-run", min_width=110)
            more = gr.Button(stop, size="md", interactive=False, elem_id=f"{name}-stop", min_width=80) if stop else None
            cancel = gr.Button("Cancel", size="md", interactive=False, elem_id=f"{name}-cancel", min_width=80)
        return Buttons(run, cancel, more)

    def result(self, name: str, text: str) -> gr.HTML:
        """Where progress, result or error appear."""
        return gr.HTML(str(hint(text)), elem_id=f"{name}-result", elem_classes="ne", padding=False)

    # -- the way of a click --------------------------------------------------------------------------------------------
    def wire(
        self,
        name: str,
        buttons: Buttons,
        inputs: Sequence[Any],
        result: gr.HTML,
        work: Callable[..., str],
        also: Sequence[Any] = (),
    ) -> None:
        """Run `work(job, *values)` in a thread at a click (or at the events `also`) and show what it gives."""

        async def run(request: gr.Request, *values: Any) -> AsyncIterator[tuple[Any, ...]]:
            async for panel, running in self._followed(
                request.session_hash or "", name, lambda job: work(job, *values)
            ):
                ends = [gr.update(interactive=running)] * (1 if buttons.stop is None else 2)
                yield (panel, gr.update(interactive=not running), *ends)

        def cancel(request: gr.Request) -> None:
            job = self.jobs.of(request.session_hash or "", name)
            if job is not None:
                job.cancel()

        def stop(request: gr.Request) -> None:
            job = self.jobs.of(request.session_hash or "", name)
            if job is not None:
                job.stop()

        outputs = [result, buttons.run, buttons.cancel, *([buttons.stop] if buttons.stop is not None else [])]
        for event in (buttons.run.click, *also):
            event(run, list(inputs), outputs, concurrency_limit=None, scroll_to_output=True, **SETTLED)
        buttons.cancel.click(cancel, None, None, concurrency_limit=None, **SETTLED)
        if buttons.stop is not None:
            buttons.stop.click(stop, None, None, concurrency_limit=None, **SETTLED)

    async def _followed(self, session: str, name: str, work: Callable[[Job], str]) -> AsyncIterator[tuple[str, bool]]:
        """What there is to show of a job from its start to its end, and whether it runs."""
        try:
            job = self.jobs.start(session, name, work)
        except OptionError as error:
            yield str(error_panel(error)), False
            return
        try:
            last = None
            yield str(progress_panel(0, 0, "")), True
            while job.is_running:
                now = job.state
                if now is not last:
                    last = now
                    panel = progress_panel(now.done, now.total, now.what, waits=now.waits, shown=now.shown)
                    yield str(panel), True
                await asyncio.sleep(LOOK)
            yield _ended(job), False
        finally:
            job.cancel()  # the page went away; a job that has ended stays as it is

    # -- what tabs share -----------------------------------------------------------------------------------------------
    def optional_file(self, text: str | None, what: str) -> Path | None:
        """The path of a field that may be empty."""
        return self.folders.reading(text, what) if text else None

    def written(self, place: Path, more: str = "") -> Markup:
        """That a file was written, and the link that saves it."""
        link = linked(self.downloads.add(place.name, place), "Download") if place.is_file() else Markup()
        return mark("div", verdict(f"Written: {self.folders.shown(place)}", more=more), link, class_="ne-written")


def _ended(job: Job) -> str:
    if job.was_cancelled:
        return str(verdict("Cancelled.", False, "Nothing was written."))
    return str(error_panel(job.error)) if job.error is not None else job.result


def number_field(
    label: str, value: str = "", *, info: str | None = None, name: str | None = None, visible: bool = True
) -> gr.Textbox:
    """A field for a number, which may be empty (Gradio's own takes an empty one for 0)."""
    return gr.Textbox(value, label=label, info=info, elem_id=name, max_length=24, min_width=110, visible=visible)


def whole(text: str | None, what: str) -> int | None:
    """The whole number of a field, None where it is empty.

    Raises:
        OptionError: it is none.
    """
    return None if not (text or "").strip() else int(_number(int, str(text), what, "a whole number"))


def decimal(text: str | None, what: str) -> float | None:
    """The number of a field, None where it is empty.

    Raises:
        OptionError: it is none.
    """
    return None if not (text or "").strip() else float(_number(float, str(text).replace(",", "."), what, "a number"))


def _number(kind: type[int] | type[float], text: str, what: str, expected: str) -> float:
    try:
        found = kind(text.strip())
    except ValueError:
        raise OptionError(f"{what}: expected {expected}, found {shown(text, 24)}") from None
    if not math.isfinite(found):
        raise OptionError(f"{what}: expected {expected}, found {shown(text, 24)}")
    return found


def chosen_dtype(name: str) -> Any:
    """The number format of a choice of `DTYPES`, None for that of the file."""
    import torch

    found = DTYPES.get(name)
    return None if found is None else getattr(torch, found)


def devices() -> list[str]:
    """Where this machine can compute."""
    import torch

    found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return [*found, *(["mps"] if torch.backends.mps.is_available() else [])]
