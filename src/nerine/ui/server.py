"""The server: a socket on 127.0.0.1, a temporary folder for uploads, the app behind its guard, until it is told to end.

Gradio is imported when a server starts, with its telemetry off. This file knows nothing of tabs and tools.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nerine.errors import MissingExtra, OptionError

if TYPE_CHECKING:
    from nerine.ui.guard import App

__all__ = ["HOST", "Settings", "app_of", "environment", "serve"]

HOST = "127.0.0.1"
PORT, MOST_PORTS = 7860, 100
NEEDED = ("gradio", "uvicorn", "matplotlib", "PIL")
_TOKEN = re.compile(r"[A-Za-z0-9._~-]{8,256}")
QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_SSR_MODE": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}


def new_token() -> str:
    return secrets.token_urlsafe(24)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a server may do: the `folders` it reads and writes, the `port` (None: 7860 or the next free one), the
    `token` (None: anybody on this machine comes in), and the bytes of an upload."""

    folders: Sequence[Path] = (Path("."),)
    port: int | None = None
    token: str | None = field(default_factory=new_token)
    max_upload: int = 4 * 10**9

    def __post_init__(self) -> None:
        if self.port is not None and not 1 <= self.port <= 65535:
            raise OptionError(f"--port: expected 1 to 65535, got {self.port}")
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            raise OptionError("--token: expected 8 to 256 letters, digits and . _ ~ -; leave it out for a random one")
        if self.max_upload < 1:
            raise OptionError(f"--max-upload: expected at least one byte, got {self.max_upload}")


def serve(settings: Settings, ready: Callable[[str], None]) -> None:
    """Run until SIGINT or SIGTERM; `ready` is told the address, with its token, once the server listens.

    Raises:
        MissingExtra: Gradio or one of its companions is not installed.
        OptionError: a folder is none, or the port is taken.
    """
    from nerine.ui.folders import Folders

    lacking = [name for name in NEEDED if find_spec(name) is None]
    if lacking:
        raise MissingExtra(f'nerine ui needs {", ".join(lacking)}: pip install "nerine[ui]"')
    Folders(settings.folders)  # a wrong one is told before anything slow
    with listening(settings.port) as server, tempfile.TemporaryDirectory(prefix="nerine-ui-") as uploads:
        port = server.getsockname()[1]
        tail = "" if settings.token is None else f"?token={settings.token}"
        with app_of(settings, port, Path(uploads)) as app, terminated():
            _run(app, server, lambda: ready(f"http://{HOST}:{port}/{tail}"))


@contextmanager
def app_of(settings: Settings, port: int, uploads: Path) -> Iterator[App]:
    """The app behind its guard; jobs that still run at the end are cancelled."""
    with environment(uploads):
        from nerine.ui.app import build
        from nerine.ui.folders import Folders
        from nerine.ui.guard import Guard
        from nerine.ui.jobs import Jobs

        jobs = Jobs()
        try:
            inner = build(Folders(settings.folders, uploads), jobs, settings.max_upload)
            yield Guard(inner, token=settings.token, port=port, uploads=uploads, max_upload=settings.max_upload)
        finally:
            jobs.close()


@contextmanager
def environment(uploads: Path) -> Iterator[None]:
    """The variables that keep Gradio quiet, and uploads where they are removed; as they were, afterwards."""
    wanted: Mapping[str, str] = {**QUIET, "GRADIO_TEMP_DIR": str(uploads)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def listening(port: int | None) -> Iterator[socket.socket]:
    """A socket on this machine alone, at that port, or at the first free one.

    Raises:
        OptionError: the port is taken, or all of them are.
    """
    tried = [port] if port is not None else list(range(PORT, PORT + MOST_PORTS))
    for one in tried:
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if os.name == "posix":  # a port of a server that has just ended; on Windows this would steal one that is in use
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((HOST, one))
            server.listen(128)
        except OSError:
            server.close()
            continue
        with server:
            yield server
        return
    where = f"port {tried[0]} is" if len(tried) == 1 else f"ports {tried[0]} to {tried[-1]} are"
    raise OptionError(f"--port: {where} taken or not allowed on {HOST}; give another --port")


@contextmanager
def terminated() -> Iterator[None]:
    """SIGTERM ends the program as Ctrl-C does, so that the temporary folder goes away with it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(app: App, server: socket.socket, ready: Callable[[], None]) -> None:
    import uvicorn

    class Server(uvicorn.Server):  # type: ignore[misc]
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets=sockets)
            if self.started:
                ready()

    # Pages that are open when the server ends are cut off, which uvicorn would call an error, with a traceback.
    options = {"log_level": "critical", "access_log": False, "ws": "none", "proxy_headers": False}
    config = uvicorn.Config(app, **options, server_header=False, lifespan="on", timeout_graceful_shutdown=1)
    Server(config).run(sockets=[server])
