"""The door of the web app, before anything of Gradio runs: who is asking, from where, for what, and with how much.

A request needs the token (once in the address, then in a cookie), must call this machine by its own name (no name of
somebody else's that leads here), must not come from another page, may ask for a short list of addresses only, and may
bring a bounded body. Everything else is answered here in one sentence. ASGI and nothing else; knows no tools.
"""

from __future__ import annotations

import hmac
import re
import shutil
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

__all__ = ["Guard"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

NAMES = frozenset({"127.0.0.1", "localhost"})
LARGEST_CALL = 2**20  # bytes of a request that uploads nothing
SLACK = 2**16  # bytes around the files of an upload
KEPT_FREE = 2**30  # bytes of the disk that uploads leave
UPLOAD = "/gradio_api/upload"
_PAGES = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static|svelte)/[\w./~@+-]+"
    r"|/gradio_api/(startup-events|app_id|theme\.css|heartbeat/\w+|queue/data|upload_progress)"
    r"|/download/[\w-]+/[^/]+"
)
_CALLS = re.compile(rf"{UPLOAD}|/gradio_api/(queue/join|cancel|reset|run/\w+)/?")
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
# A page and not a redirect: the request that follows then comes from here, so that a strict cookie goes with it even
# where the address was clicked on in another page.
WELCOME = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><title>nerine</title>'
    '<meta http-equiv="refresh" content="0;url=/"><p><a href="/">nerine</a></p></html>'
)


class Refused(Exception):
    """A status, and the sentence that goes with it."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class Guard:
    """The app behind the door. Without a `token` everybody on this machine may come in; the other checks stay."""

    def __init__(self, app: App, *, token: str | None, port: int, uploads: Path, max_upload: int) -> None:
        self.app, self.token, self.uploads, self.max_upload = app, token, uploads, max_upload
        self.cookie = f"nerine-{port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            headers = _Headers(scope["headers"])
            self._check_place(scope, headers)
            if self._brings_token(scope):
                await _answer(send, 200, WELCOME, "text/html; charset=utf-8", [(b"set-cookie", self._cookie())])
                return
            self._check_token(headers)
            self._check_what(scope, headers)
        except Refused as no:
            await _answer(send, no.status, no.sentence + "\n")
            return
        await self.app(scope, receive, _with_headers(send))

    # -- who and from where --------------------------------------------------------------------------------------------
    def _check_place(self, scope: Scope, headers: _Headers) -> None:
        """That this machine is called by its own name, and not by a page of another one."""
        host = headers.one("host")
        name, _, port = host.partition(":")
        if name.lower() not in NAMES or not re.fullmatch(r"\d{0,5}", port):
            raise Refused(403, "This server answers to 127.0.0.1 and localhost only.")
        origin = headers.one("origin")
        if origin and origin != f"http://{host}":
            raise Refused(403, "This request comes from another page and is not answered.")
        if headers.one("sec-fetch-site") in ("cross-site", "same-site"):
            is_visit = scope["method"] == "GET" and scope["path"] == "/" and headers.one("sec-fetch-mode") == "navigate"
            if not is_visit:
                raise Refused(403, "This request comes from another page and is not answered.")

    def _brings_token(self, scope: Scope) -> bool:
        if self.token is None or scope["path"] != "/" or scope["method"] != "GET":
            return False
        given = parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=20).get("token", [])
        return len(given) == 1 and self._is_token(given[0])

    def _check_token(self, headers: _Headers) -> None:
        if self.token is None:
            return
        pairs = (part.strip().partition("=") for part in headers.one("cookie").split(";"))
        if not any(self._is_token(value) for name, _, value in pairs if name == self.cookie):
            raise Refused(
                401, "This page needs its token: open the address that `nerine ui` printed, with ?token=... at its end."
            )

    def _is_token(self, given: str) -> bool:
        return self.token is not None and hmac.compare_digest(given.encode("utf-8", "replace"), self.token.encode())

    def _cookie(self) -> bytes:
        return f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict".encode()

    # -- for what and with how much ------------------------------------------------------------------------------------
    def _check_what(self, scope: Scope, headers: _Headers) -> None:
        path, method = scope["path"], scope["method"]
        known = _CALLS if method == "POST" else _PAGES if method in ("GET", "HEAD") else None
        if known is None or not known.fullmatch(path) or ".." in path:
            raise Refused(404, "There is nothing here.")
        if method == "POST":
            self._check_body(path, headers)

    def _check_body(self, path: str, headers: _Headers) -> None:
        told = headers.one("content-length")
        if not re.fullmatch(r"\d{1,18}", told):
            raise Refused(411, "This request does not say how long it is.")
        length = int(told)
        if path != UPLOAD:
            if length > LARGEST_CALL:
                raise Refused(413, f"This request is longer than the {LARGEST_CALL:,} bytes that are allowed.")
            return
        if length > self.max_upload + SLACK:
            raise Refused(413, f"This upload is larger than the {self.max_upload:,} bytes that are allowed.")
        if length + KEPT_FREE > shutil.disk_usage(self.uploads).free:
            raise Refused(507, "The disk has no room for this upload.")


class _Headers:
    """The headers of a request by name; one that comes twice is refused."""

    def __init__(self, raw: Iterable[tuple[bytes, bytes]]) -> None:
        self._found: dict[str, list[str]] = {}
        for name, value in raw:
            self._found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))

    def one(self, name: str) -> str:
        values = self._found.get(name, [])
        if len(values) > 1:
            raise Refused(400, f"The header {name} comes twice.")
        return values[0].strip() if values else ""


def _with_headers(send: Send) -> Send:
    """Answers that say what a page of ours may do: talk to this server, and to nobody else."""
    names = {name for name, _ in HEADERS}

    async def sent(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            own = [(name, value) for name, value in message.get("headers", ()) if name.lower() not in names]
            message = {**message, "headers": [*own, *HEADERS]}
        await send(message)

    return sent


async def _answer(
    send: Send,
    status: int,
    text: str,
    kind: str = "text/plain; charset=utf-8",
    more: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    body = text.encode()
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    headers += [(b"cache-control", b"no-store"), *more]
    await _with_headers(send)({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
