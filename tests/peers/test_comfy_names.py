"""The same layers by ComfyUI's own tables of names; `NERINE_COMFYUI` says where its sources are."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from meta_models import diffusers_shapes
from nerine.files.names import Alias, aliases

pytest.importorskip("diffusers", reason="needs diffusers: pip install 'nerine[train]'")

SOURCE = os.environ.get("NERINE_COMFYUI", "")

pytestmark = [
    pytest.mark.peers,
    pytest.mark.no_device_guard,
    pytest.mark.skipif(not SOURCE, reason="needs ComfyUI's sources: set NERINE_COMFYUI to a checkout"),
]

SD1 = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}
SDXL = {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
}


class NoArguments:
    """Of a command line that asks for nothing."""

    def __getattr__(self, name: str) -> bool:
        return False


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`comfy/utils.py` alone, without what else it would load."""
    pytest.importorskip("einops", reason="ComfyUI needs einops: pip install einops")
    for name in ("comfy", "comfy.checkpoint_pickle", "comfy.cli_args"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    comfy: Any = sys.modules["comfy"]
    comfy.checkpoint_pickle = sys.modules["comfy.checkpoint_pickle"]
    arguments: Any = sys.modules["comfy.cli_args"]
    arguments.args = NoArguments()
    spec = importlib.util.spec_from_file_location("comfy.utils", Path(SOURCE) / "comfy" / "utils.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def theirs(table: dict[str, Any], own: str) -> set[tuple[str, tuple[int, int] | None, bool]]:
    """What their table says of a layer: its name, its rows, whether halves are turned."""
    entry = next((table[key] for key in (f"{own}.weight", own) if key in table), None)
    if entry is None:
        return set()
    name, span, *turn = entry if isinstance(entry, tuple) else (entry, None)
    stem = name.removesuffix(".weight").removesuffix(".scale")
    return {(stem, (span[1], span[1] + span[2]) if span else None, bool(turn))}


def ours(found: tuple[Alias, ...], own: str) -> set[tuple[str, tuple[int, int] | None, bool]]:
    return {(a.name, None if a.own_rows else a.rows, a.own_rows is not None) for a in found if a.own == own}


@pytest.mark.parametrize(
    ("name", "function", "settings"),
    [
        ("unet sd1", "unet_to_diffusers", SD1),
        ("unet sd2", "unet_to_diffusers", SD1),
        ("unet sdxl", "unet_to_diffusers", SDXL),
        ("flux", "flux_to_diffusers", {"depth": 2, "depth_single_blocks": 2, "hidden_size": 128}),
        ("sd3", "mmdit_to_diffusers", {"depth": 2, "num_blocks": 2}),
        ("sd3.5", "mmdit_to_diffusers", {"depth": 3, "num_blocks": 3}),
        ("pixart", "pixart_to_diffusers", {"depth": 2, "hidden_size": 1152}),
        ("auraflow", "auraflow_to_diffusers", {"n_double_layers": 2, "n_layers": 4}),
    ],
)
def test_the_same_names(comfy: Any, name: str, function: str, settings: dict[str, Any]) -> None:
    table = getattr(comfy, function)(settings)
    shapes = diffusers_shapes(name)
    found = aliases(shapes)["native"]
    assert {own: ours(found, own) for own in shapes} == {own: theirs(table, own) for own in shapes}
