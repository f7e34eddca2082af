"""The door of the web app: who is let in, and who is not."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nerine.ui.guard import LARGEST_CALL, Guard

httpx = pytest.importorskip("httpx", reason="httpx is not installed (it comes with gradio)")

TOKEN = "correct-horse-battery"
COOKIE = {"cookie": f"nerine-7860={TOKEN}"}
HOME = "http://127.0.0.1:7860"


async def inside(scope: Any, receive: Any, send: Any) -> None:
    """The app behind the door: says what it was asked for."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-content-type-options", b"sniff")]})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


def ask(
    guard: Guard, method: str, path: str, headers: Mapping[str, str] | list[tuple[str, str]] = (), **more: Any
) -> Any:
    async def asked() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=guard), base_url=HOME) as client:
            return await client.request(method, path, headers=headers, **more)

    return asyncio.run(asked())


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    return Guard(inside, token=TOKEN, port=7860, uploads=tmp_path, max_upload=1000)


# -- the token ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "cookie",
    [
        "",
        "nerine-7860=",
        "nerine-7860=wrong",
        f"nerine-7860={TOKEN}x",
        f"nerine-7860={TOKEN[:-1]}",
        f"nerine-7861={TOKEN}",
        f"other={TOKEN}",
        "nerine-7860=\u00e9",
    ],
)
def test_without_the_token_there_is_one_sentence(guard: Guard, cookie: str) -> None:
    for path in ("/", "/config", "/gradio_api/file=/etc/passwd", "/download/x/y", "/nowhere"):
        answer = ask(guard, "GET", path, {"cookie": cookie.encode("latin-1")} if cookie else {})
        assert answer.status_code == 401
        assert answer.text.count("\n") == 1
        assert answer.text.startswith("This page needs its token")
        assert "set-cookie" not in answer.headers


def test_the_token_in_the_address_becomes_a_cookie_that_scripts_and_other_pages_cannot_use(guard: Guard) -> None:
    answer = ask(guard, "GET", f"/?token={TOKEN}")
    assert answer.status_code == 200
    assert answer.headers["set-cookie"] == f"nerine-7860={TOKEN}; Path=/; HttpOnly; SameSite=Strict"
    assert TOKEN not in answer.text
    assert 'content="0;url=/"' in answer.text
    assert answer.headers["cache-control"] == "no-store"
    assert ask(guard, "GET", "/", COOKIE).text == "/"


@pytest.mark.parametrize(
    "query", ["token=wrong", f"token={TOKEN}&token={TOKEN}", "token=", f"Token={TOKEN}", "token=%ff%00"]
)
def test_a_wrong_token_in_the_address_opens_nothing(guard: Guard, query: str) -> None:
    answer = ask(guard, "GET", f"/?{query}")
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers


def test_the_token_in_the_address_counts_on_the_first_page_alone(guard: Guard) -> None:
    assert ask(guard, "GET", f"/config?token={TOKEN}").status_code == 401
    assert ask(guard, "POST", f"/?token={TOKEN}").status_code == 401


def test_without_a_token_the_other_checks_stay(tmp_path: Path) -> None:
    guard = Guard(inside, token=None, port=7860, uploads=tmp_path, max_upload=1000)
    assert ask(guard, "GET", "/").status_code == 200
    assert ask(guard, "GET", "/", {"host": "evil.example"}).status_code == 403
    assert ask(guard, "GET", "/gradio_api/file=/etc/passwd").status_code == 404


# -- from where --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "localhost:9999", "LOCALHOST", "127.0.0.1"])
def test_this_machine_by_its_own_names_is_let_in(guard: Guard, host: str) -> None:
    assert ask(guard, "GET", "/", {**COOKIE, "host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:7860",
        "127.0.0.1.evil.example",
        "localhost.evil.example:7860",
        "0.0.0.0:7860",
        "192.168.0.2:7860",
        "[::1]:7860",
        "127.0.0.1:7860@evil.example",
        "127.0.0.1:786011",
        "127.0.0.1:x",
        "localhost.:80",
        "",
    ],
)
def test_names_of_others_that_lead_here_are_refused(guard: Guard, host: str) -> None:
    answer = ask(guard, "GET", "/", {**COOKIE, "host": host})
    assert answer.status_code == 403


def test_a_second_host_is_refused(guard: Guard) -> None:
    pairs = [("cookie", COOKIE["cookie"]), ("host", "127.0.0.1:7860"), ("host", "evil.example")]
    assert ask(guard, "GET", "/", pairs).status_code in (400, 403)


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "https://127.0.0.1:7860",
        "http://127.0.0.1",
        "http://127.0.0.1:9999",
        "http://evil.example",
        "http://localhost:7860",
        "http://127.0.0.1:7860.evil.example",
    ],
)
def test_other_pages_cannot_post(guard: Guard, origin: str) -> None:
    answer = ask(guard, "POST", "/gradio_api/queue/join", {**COOKIE, "origin": origin}, content=b"{}")
    assert answer.status_code == 403


def test_the_own_page_can_post(guard: Guard) -> None:
    answer = ask(guard, "POST", "/gradio_api/queue/join", {**COOKIE, "origin": HOME}, content=b"{}")
    assert answer.status_code == 200


def test_requests_that_browsers_mark_as_foreign_are_refused_but_a_visit(guard: Guard) -> None:
    foreign = {**COOKIE, "sec-fetch-site": "cross-site"}
    assert ask(guard, "GET", "/gradio_api/queue/data", foreign).status_code == 403
    assert ask(guard, "GET", "/config", {**foreign, "sec-fetch-site": "same-site"}).status_code == 403
    assert ask(guard, "GET", "/", {**foreign, "sec-fetch-mode": "no-cors"}).status_code == 403
    assert ask(guard, "GET", "/", {**foreign, "sec-fetch-mode": "navigate"}).status_code == 200


# -- for what ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../etc/passwd",
        "/gradio_api/file=%2e%2e/%2e%2e/etc/passwd",
        "/gradio_api/file=http://169.254.169.254/",
        "/file=/etc/passwd",
        "/file//etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/proxy=http://evil.example/",
        "/gradio_api/custom_component/x/client/component/..%2f..%2fetc",
        "/static/../../etc/passwd",
        "/static/%2e%2e/%2e%2e/etc/passwd",
        "/assets/..%2f..%2fetc/passwd",
        "/docs",
        "/openapi.json",
        "/gradio_api/info",
        "/monitoring",
        "/gradio_api/vibe-code",
        "/gradio_api/runs",
        "/download/../../etc/passwd",
        "/download/key/a/b",
    ],
)
def test_addresses_that_the_page_does_not_need_are_not_there(guard: Guard, path: str) -> None:
    assert ask(guard, "GET", path, COOKIE).status_code == 404


@pytest.mark.parametrize(
    "path", ["/gradio_api/vibe-edit", "/gradio_api/run-history/connect", "/login", "/", "/gradio_api/call/x"]
)
def test_nothing_else_can_be_posted_to(guard: Guard, path: str) -> None:
    assert ask(guard, "POST", path, COOKIE, content=b"{}").status_code == 404


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_no_other_methods(guard: Guard, method: str) -> None:
    assert ask(guard, method, "/", COOKIE).status_code == 404


# -- with how much -----------------------------------------------------------------------------------------------------
def test_bodies_are_bounded_before_they_are_read(guard: Guard) -> None:
    def told(path: str, length: str) -> int:
        headers = {**COOKIE, "content-length": length}
        return int(ask(guard, "POST", path, headers, content=iter_nothing()).status_code)

    assert told("/gradio_api/upload", "1000") == 200
    assert told("/gradio_api/upload", str(1000 + 2**16 + 1)) == 413
    assert told("/gradio_api/upload", "9" * 18) == 413
    assert told("/gradio_api/upload", "9" * 30) == 411
    assert told("/gradio_api/upload", "-1") == 411
    assert told("/gradio_api/queue/join", str(LARGEST_CALL)) == 200
    assert told("/gradio_api/queue/join", str(LARGEST_CALL + 1)) == 413
    unsaid = ask(
        guard, "POST", "/gradio_api/upload", {**COOKIE, "transfer-encoding": "chunked"}, content=iter_nothing()
    )
    assert unsaid.status_code == 411


async def iter_nothing() -> Any:
    """A body of which only the headers are looked at."""
    yield b""


def test_an_upload_that_the_disk_has_no_room_for_is_refused(tmp_path: Path) -> None:
    guard = Guard(inside, token=TOKEN, port=7860, uploads=tmp_path, max_upload=10**17)
    headers = {**COOKIE, "content-length": str(10**16)}
    assert ask(guard, "POST", "/gradio_api/upload", headers, content=iter_nothing()).status_code == 507


# -- what is said along ------------------------------------------------------------------------------------------------
def test_every_answer_forbids_the_page_to_talk_to_others(guard: Guard) -> None:
    for headers in (COOKIE, {}):
        answer = ask(guard, "GET", "/", headers)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers.get_list("x-content-type-options") == ["nosniff"]


def test_sockets_are_closed(guard: Guard) -> None:
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(guard({"type": "websocket", "headers": [], "path": "/"}, None, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]
