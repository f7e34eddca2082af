"""`resize` beside sd-scripts' own resize_lora, where NERINE_SD_SCRIPTS names a checkout of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nerine.tools.resize import resize

ROOT = Path(__file__).parents[2]
CHECKOUT = os.environ.get("NERINE_SD_SCRIPTS", "")

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not CHECKOUT, reason="needs a checkout of sd-scripts: set NERINE_SD_SCRIPTS to it"),
]

SHAPES = {
    "down_blocks_0_to_q": (40, 24),
    "mid_block_proj": (24, 64),
    "mid_block_conv": (20, 12, 3, 3),
    "up_point": (16, 30, 1, 1),
}
OLD = 12


def lora(file: Path) -> Path:
    """Layers with spectra that fall at different paces, one that is nothing, alpha that is not the rank."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for number, (name, (out, inputs, *kernel)) in enumerate(SHAPES.items()):
        pace = torch.logspace(0, -0.7 * (number + 1), OLD).reshape(OLD, *[1] * (1 + len(kernel)))
        stem = f"lora_unet_{name}"
        tensors[f"{stem}.lora_down.weight"] = pace * torch.randn(OLD, inputs, *kernel, generator=generator)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(out, OLD, *[1] * len(kernel), generator=generator)
        tensors[f"{stem}.alpha"] = torch.tensor(3.0)
    silent = "lora_unet_time_embedding_linear_1"
    tensors[f"{silent}.lora_down.weight"] = torch.randn(OLD, 10, generator=generator)
    tensors[f"{silent}.lora_up.weight"] = torch.randn(14, OLD, generator=generator) * 1e-9
    tensors[f"{silent}.alpha"] = torch.tensor(3.0)
    save_file(tensors, file)
    return file


@pytest.mark.parametrize(
    ("rank", "conv_rank", "method", "param"),
    [
        (4, 4, None, None),
        (6, 3, None, None),
        (OLD, OLD, "sv_ratio", 4.0),
        (OLD, OLD, "sv_ratio", 20.0),
        (OLD, OLD, "sv_fro", 0.7),
        (OLD, OLD, "sv_fro", 0.95),
        (OLD, OLD, "sv_cumulative", 0.4),
        (OLD, OLD, "sv_cumulative", 0.8),
        (5, 4, "sv_cumulative", 0.8),
    ],
)
def test_the_same_ranks_alphas_and_weights(
    rank: int, conv_rank: int, method: str | None, param: float | None, tmp_path: Path
) -> None:
    file, theirs, ours = lora(tmp_path / "a.safetensors"), tmp_path / "t.safetensors", tmp_path / "o.safetensors"
    script = [str(ROOT / "tests" / "sd_scripts" / "resize.py"), CHECKOUT, str(file), str(theirs)]
    words = [str(rank), str(conv_rank), method or "-", "-" if param is None else str(param)]
    done = subprocess.run([sys.executable, *script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    resize(file, ours, rank=rank, conv_rank=conv_rank, method=method, param=param)
    found, wanted = load_file(ours), load_file(theirs)
    assert found.keys() == wanted.keys()
    for stem in sorted({key.split(".")[0] for key in found}):
        down, up, alpha = (f"{stem}.{suffix}" for suffix in ("lora_down.weight", "lora_up.weight", "alpha"))
        if method is None and "time" in stem:  # a layer that is nothing: sd-scripts keeps one rank whatever it is told
            continue
        assert found[down].shape == wanted[down].shape, stem
        products = []
        for tensors in (found, wanted):
            scale = tensors[alpha] / tensors[down].shape[0]
            products.append(tensors[up].flatten(1) @ tensors[down].flatten(1) * scale)
        limit = 1e-5 * float(products[1].abs().max()) + 1e-12  # of the dense decomposition in fp32, in its vectors
        assert float((products[0] - products[1]).abs().max()) < limit, stem
        if method is not None:
            assert found[alpha] == wanted[alpha], stem
