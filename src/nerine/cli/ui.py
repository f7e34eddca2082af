"""`nerine ui`: the tools in a browser, on this machine alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import typer

from nerine.cli.shared import size_of
from nerine.errors import OptionError

__all__ = ["ui"]


def ui(
    folders: list[Path] = typer.Option(
        [],
        "--folder",
        help="A folder that the page may read and write, as often as you like; the current one if left out.",
        show_default=False,
    ),
    port: int | None = typer.Option(None, "--port", help="7860 or the next free one if left out."),
    token: str | None = typer.Option(None, "--token", help="The token to ask for; a random one if left out."),
    no_token: bool = typer.Option(False, "--no-token", help="Ask for none: everybody on this machine may come in."),
    browser: bool = typer.Option(False, "--open/--no-browser", help="Open the page in the browser."),
    max_upload: str = typer.Option("4GB", "--max-upload", help="The size of an upload, at most."),
    as_json: bool = typer.Option(False, "--json", help='Print {"url": ...} once the page is there.'),
) -> None:
    """Serve a page with the tools: inspect, compare, convert, resize, combine, merge, plan, and the demo to train.

    It listens on 127.0.0.1 alone and asks for a token, which is in the address that is printed. Ctrl-C ends it.

    Examples:
      nerine ui --folder ~/loras --folder ~/checkpoints
      nerine ui --open
    """
    from nerine.ui import Settings, serve

    if token is not None and no_token:
        raise typer.BadParameter("--token and --no-token exclude each other")
    try:
        largest = size_of(max_upload)
    except OptionError as error:
        raise OptionError(str(error).replace("--size", "--max-upload", 1)) from None
    settings = Settings(folders=tuple(folders) or (Path("."),), port=port, max_upload=largest)
    if token is not None or no_token:
        settings = replace(settings, token=token)

    def ready(url: str) -> None:
        typer.echo(json.dumps({"url": url}) if as_json else f"{url}\nCtrl-C ends it.")
        if browser:
            import webbrowser

            webbrowser.open(url)

    serve(settings, ready)
