"""What tabs make of the texts in their fields, without a browser; and how Gradio is configured."""

from __future__ import annotations

import asyncio
import gc
import importlib
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from nerine.algorithms import LoRA
from nerine.errors import OptionError
from nerine.ui.folders import Folders
from nerine.ui.jobs import Jobs
from nerine.ui.server import Settings, app_of
from tool_adapters import adapter_of

# Gradio and what it imports (starlette, pydantic) warn of their own future; nothing of ours does.
pytestmark = [
    pytest.mark.skipif(find_spec("gradio") is None, reason='gradio is not installed: pip install "nerine[ui]"'),
    pytest.mark.usefixtures("gradio"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def gradio() -> Iterator[None]:
    """Gradio makes event loops when it is imported and never closes them: done here, or a later test hears of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = set(map(id, _loops()))
        importlib.import_module("nerine.ui.app")
        yield
        for loop in _loops():
            if id(loop) not in before:
                loop.close()
        gc.collect()


def _loops() -> list[Any]:
    return [one for one in gc.get_objects() if issubclass(type(one), asyncio.BaseEventLoop) and not one.is_running()]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Any]:
    from nerine.ui.bench import Bench
    from nerine.ui.downloads import Downloads

    (tmp_path / "models").mkdir()
    (tmp_path / "uploads").mkdir()
    jobs = Jobs()
    yield Bench(Folders([tmp_path / "models"], tmp_path / "uploads"), jobs, Downloads(), [])
    jobs.close()


def test_numbers_are_read_from_fields_that_may_be_empty() -> None:
    from nerine.ui.bench import decimal, whole

    assert whole("", "Rank") is None
    assert whole(None, "Rank") is None
    assert whole(" 16 ", "Rank") == 16
    assert decimal("0,5", "Strength") == 0.5
    assert decimal("-1e-3", "Strength") == -1e-3
    for text in ("4.5", "four", "1e3", "9" * 5000 + "x"):
        with pytest.raises(OptionError, match="Rank: expected a whole number, found"):
            whole(text, "Rank")
    for text in ("nan", "inf", "-inf", "1..2"):
        with pytest.raises(OptionError, match="Strength: expected a number, found"):
            decimal(text, "Strength")


def test_settings_of_an_algorithm_are_read_from_one_line() -> None:
    from nerine.ui.tabs.plan import _settings

    assert _settings(" alpha = 8, factor=4 ,") == {"alpha": "8", "factor": "4"}
    assert _settings("") == _settings(None) == {}
    with pytest.raises(OptionError, match="expected alpha=8"):
        _settings("alpha")


def test_a_rule_of_resize_is_one_setting() -> None:
    from nerine.ui.tabs.resize import _how

    assert _how("rank", "4", 0.9, "20") == {"rank": 4}
    assert _how("energy", "", 0.9, "") == {"energy": 0.9}
    assert _how("size", "", 0.9, "1.5") == {"size": 1_500_000}
    with pytest.raises(OptionError, match="rank: give a number"):
        _how("rank", "", 0.9, "")


def test_the_demo_does_not_write_over_an_earlier_one(bench: Any) -> None:
    from nerine.tiny.demo import DemoSettings
    from nerine.ui.tabs.train import _target

    settings, root = DemoSettings(), bench.folders.roots[0]
    assert _target(bench, "demo", settings, False) == root / "demo"
    (root / "demo").mkdir()
    (root / "demo/neon-dora-lokr.png").write_bytes(b"")
    with pytest.raises(OptionError, match=r"demo/neon-dora-lokr\.png is there already"):
        _target(bench, "demo", settings, False)
    assert _target(bench, "demo", settings, True) == root / "demo"
    (root / "demo/neon-dora-lokr.safetensors").symlink_to("/etc/passwd")
    with pytest.raises(OptionError, match="is a link"):
        _target(bench, "demo", settings, True)
    with pytest.raises(OptionError, match="leads outside"):
        _target(bench, "../elsewhere", settings, True)


def test_strengths_and_files_are_paired_and_counted(bench: Any) -> None:
    from nerine.ui.shelf import MOST, chosen

    root = bench.folders.roots[0]
    adapter_of(root / "a.safetensors", LoRA(rank=2), nn.Linear)
    values = ["a.safetensors", None, "a.safetensors", *[None] * (MOST - 3), "0.5", "1.0", "-1", *["1.0"] * (MOST - 3)]
    assert chosen(bench, values, 2) == [(root / "a.safetensors", 0.5), (root / "a.safetensors", -1.0)]
    with pytest.raises(OptionError, match="choose 3 adapters at least, found 2"):
        chosen(bench, values, 3)
    values[MOST] = ""
    with pytest.raises(OptionError, match="Adapter 1: give its strength"):
        chosen(bench, values, 1)


def test_which_programs_read_a_file_is_told(bench: Any) -> None:
    from nerine.ui.saved import readers

    file = adapter_of(bench.folders.roots[0] / "a.safetensors", LoRA(rank=2), nn.Linear, dialect="kohya")
    told = readers(file)
    assert "ComfyUI</td><td>✓ exactly" in told
    assert "does not know the names of the kohya dialect" in told
    file.write_bytes(b"no adapter")
    assert "cannot be told" in readers(file)


def test_gradio_phones_nobody_serves_nothing_and_takes_no_foreign_file(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "uploads").mkdir()
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(b"x")
    with app_of(Settings(folders=(tmp_path / "models",), max_upload=1234), 7860, tmp_path / "uploads") as app:
        inner: Any = app
        (mounted,) = (
            route.app for route in inner.app.routes if hasattr(route, "app") and hasattr(route.app, "get_blocks")
        )
        page = mounted.get_blocks()
        assert page.analytics_enabled is False
        assert page.share is False
        assert page.allowed_paths == []
        assert page.max_file_size == 1234
        assert all(fn.api_visibility == "private" for fn in page.fns.values())
        assert "http" not in page.theme_css.replace("http://www.w3.org", "")
        for block in page.blocks.values():
            for named in (str(secret), "/etc/passwd", "http://127.0.0.1:1/x", "https://example.com/x.safetensors"):
                with pytest.raises(OptionError, match="leads outside"):
                    asyncio.run(block.async_move_resource_to_block_cache(named))
