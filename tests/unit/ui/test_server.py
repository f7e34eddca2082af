"""The server around the app: settings, the socket, the environment of Gradio, and what is missing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from commands import run
from nerine.errors import MissingExtra, OptionError
from nerine.ui import Settings, serve
from nerine.ui import server as module
from nerine.ui.downloads import Downloads
from nerine.ui.server import HOST, PORT, environment, listening


def test_the_socket_is_on_this_machine_alone_and_takes_the_next_free_port() -> None:
    with listening(None) as first, listening(None) as second:
        a, b = first.getsockname(), second.getsockname()
        assert a[0] == b[0] == HOST == "127.0.0.1"
        assert PORT <= a[1] < b[1]


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OptionError, match=f"--port: port {port} is taken"), listening(port):
            pass


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"token": "short"}, "--token: expected 8 to 256"),
        ({"token": "with space in it"}, "--token"),
        ({"token": "semi;colon;inside"}, "--token"),
        ({"token": ""}, "--token"),
        ({"port": 0}, "--port: expected 1 to 65535"),
        ({"port": 70000}, "--port"),
        ({"max_upload": 0}, "--max-upload"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Settings(**settings)  # type: ignore[arg-type]


def test_every_server_has_a_token_of_its_own() -> None:
    assert Settings().token != Settings().token
    assert len(str(Settings().token)) == 32


def test_a_missing_part_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "gradio" else object())
    with pytest.raises(MissingExtra, match=r'nerine ui needs gradio: pip install "nerine\[ui\]"'):
        serve(Settings(), lambda url: None)


def test_a_wrong_folder_is_told_before_anything_is_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "ui", "--folder", tmp_path / "missing")
    assert done.code == 1
    assert "expected a folder that exists" in done.err


def test_token_and_none_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "ui", "--token", "abcdefgh", "--no-token").code == 2
    sizes = run(capsys, "ui", "--max-upload", "much")
    assert sizes.code == 1
    assert "--max-upload" in sizes.err


def test_the_environment_is_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "/before")
    monkeypatch.delenv("GRADIO_ANALYTICS_ENABLED", raising=False)
    with environment(tmp_path):
        assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path)
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert os.environ["GRADIO_TEMP_DIR"] == "/before"
    assert "GRADIO_ANALYTICS_ENABLED" not in os.environ


def test_help_and_the_package_import_neither_gradio_nor_torch() -> None:
    code = (
        "import sys, nerine.cli, nerine.ui; print([n for n in ('gradio', 'torch', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_downloads_have_addresses_of_their_own_and_the_oldest_are_forgotten(tmp_path: Path) -> None:
    downloads = Downloads()
    first = downloads.add("../../etc/pass wd.html", "text")
    lead, key, name = first.split("/")
    assert lead == "download"
    assert name == ".._.._etc_pass_wd.html"
    assert downloads.get(key) == ("../../etc/pass wd.html", "text")
    assert downloads.get("guess") is None
    for number in range(64):
        downloads.add(f"{number}", tmp_path)
    assert downloads.get(key) is None
