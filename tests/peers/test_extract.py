"""Extraction beside LyCORIS's own: the same ranks, the same products, and a file that either can be merged from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoint_pairs import low_rank, pair, tensors
from nerine.tools.extract import extract
from nerine.tools.merge import merge

pytestmark = pytest.mark.peers
theirs: Any = pytest.importorskip("lycoris.utils")
pytest.importorskip("diffusers", reason="the tiny model needs diffusers (extra: train)")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return pair(tmp_path_factory.mktemp("pair"), low_rank(rank=4, noise=3e-4))


def by_lycoris(base: Path, tuned: Path, mode: str, param: float) -> dict[str, Tensor]:
    """What LyCORIS extracts from the two UNets and text encoders."""
    from nerine.tiny import load_pipeline

    a, b = load_pipeline(folder=base), load_pipeline(folder=tuned)
    return theirs.extract_diff(
        [a.text_encoder], [b.text_encoder], a.unet, b.unet, mode, param, param, "cpu", small_conv=False
    )


@pytest.mark.parametrize(("mode", "param"), [("fixed", 3), ("threshold", 0.03), ("ratio", 0.35), ("quantile", 0.8)])
def test_the_file_has_the_ranks_and_the_products_of_lycoris(
    files: tuple[Path, Path], tmp_path: Path, mode: str, param: float
) -> None:
    base, tuned = files
    want = by_lycoris(base, tuned, mode, param)
    report = extract(base, tuned, tmp_path / "a.safetensors", mode=mode, param=param, dtype=torch.float16)
    got = load_file(tmp_path / "a.safetensors")
    stems = {key.rpartition(".lora_up")[0] for key in want if ".lora_up" in key}
    stems |= {key.removesuffix(".diff") for key in want if key.endswith(".diff") and "embedding" not in key}
    ours = {key.split(".", 1)[0] for key in got}
    assert {stem.replace("lora_te_encoder", "lora_te_text_model_encoder") for stem in stems} == ours
    assert len(stems) == report.layers
    ranks = set()
    for stem in stems:
        own = stem.replace("lora_te_encoder", "lora_te_text_model_encoder")
        if f"{stem}.diff" in want:
            torch.testing.assert_close(got[f"{own}.diff"], want[f"{stem}.diff"])
            continue
        more = mode == "quantile"  # theirs keeps one too few for what it says
        if more and f"{own}.diff" in got:
            continue
        rank = len(got[f"{own}.lora_down.weight"])
        assert rank - len(want[f"{stem}.lora_down.weight"]) in ((0, 1) if more else (0,)), stem
        ranks.add(rank)
        if rank == len(want[f"{stem}.lora_down.weight"]):
            products = [product(t, name) for t, name in ((got, own), (want, stem))]
            size = float(products[1].abs().max())
            torch.testing.assert_close(products[0], products[1], rtol=0, atol=4e-3 * size)  # factors in fp16
    assert ranks


def product(tensors: dict[str, Tensor], stem: str) -> Tensor:
    up, down = (tensors[f"{stem}.{name}.weight"].float().flatten(1) for name in ("lora_up", "lora_down"))
    return up @ down


def test_what_lycoris_extracted_is_merged_to_what_nerine_extracted(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Layers of either file, through the same door: weights alone, for theirs has norms and embeddings as well."""
    from safetensors.torch import save_file

    base, tuned = files
    theirs_file, ours_file = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    save_file({k: t.contiguous() for k, t in by_lycoris(base, tuned, "fixed", 3).items()}, theirs_file)
    extract(base, tuned, ours_file, rank=3, dtype=torch.float16)
    merge(base, [theirs_file], tmp_path / "a")
    merge(base, [ours_file], tmp_path / "b")
    a, b, before, after = (tensors(folder) for folder in (tmp_path / "a", tmp_path / "b", base, tuned))
    low = [name for name in before if name.endswith(("to_q.weight", "conv1.weight"))]
    assert low
    for name in low:
        size = float((after[name] - before[name]).abs().max())
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=5e-3 * size)
        assert float((b[name] - after[name]).norm()) < 0.5 * float((before[name] - after[name]).norm())
