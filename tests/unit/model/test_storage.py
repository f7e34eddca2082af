"""The table of storages: what is read is what was written, up to the rounding that the document tells of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from nerine.errors import MergeError, UnsupportedBase
from nerine.model.layer import site_of
from nerine.model.storage import storage_of
from quantised import KINDS, Kind, ScaledLinear, linear

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the packages, in what they import
DOCUMENT = Path(__file__).parents[3] / "docs" / "quantised-bases.md"
ROW = re.compile(r"^\| ([^|]+) \| `(\w+)`[^|]*\| [^|]+ \| ([\d.]+) \|$", re.MULTILINE)
ROWS = {name: (kind, lost) for name, kind, lost in ROW.findall(DOCUMENT.read_text(encoding="utf-8"))}


def test_the_document_has_every_kind() -> None:
    assert list(ROWS) == [kind.name for kind in KINDS]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_merge_loses_what_the_document_says(kind: Kind) -> None:
    layer = kind.make()
    stored, storage = layer.weight, storage_of(layer, layer.weight)
    assert storage is not None
    assert storage.write is not None
    weight = storage.read(layer, stored).float()
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    change *= 0.01 * weight.norm() / change.norm()
    new = storage.write(layer, stored, weight + change)
    assert new is not stored
    assert isinstance(new, nn.Parameter)
    assert not new.requires_grad
    lost = (storage.read(layer, new).float() - weight - change).norm() / change.norm()
    assert (type(stored).__name__, f"{float(f'{float(lost):.0e}'):g}") == ROWS[kind.name]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_read_is_near_what_was_quantised(kind: Kind) -> None:
    layer, want = kind.make(), linear().weight
    storage = storage_of(layer, layer.weight)
    assert storage is not None
    weight = storage.read(layer, layer.weight)
    assert type(weight) is torch.Tensor
    assert weight.dtype is torch.float32
    assert (weight - want).norm() < 0.12 * want.norm()
    assert storage_of(layer, layer.bias) is None


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_site_is_that_of_the_layer_that_was_quantised(kind: Kind) -> None:
    assert site_of(kind.make()) == site_of(linear())


def test_ordinary_weights_have_no_entry() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        layer = linear().to(dtype)
        assert storage_of(layer, layer.weight) is None


def _scaled(scale: torch.Tensor) -> nn.Module:
    layer = ScaledLinear(6, 4)
    layer.weight = nn.Parameter(torch.ones(4, 6).to(torch.float8_e4m3fn), requires_grad=False)
    layer.register_buffer("weight_scale_inv", scale)
    return layer


def test_blocks_that_do_not_divide_need_their_size() -> None:
    layer = _scaled(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    layer.block_size = (3, 4)
    storage = storage_of(layer, layer.weight)
    assert storage is not None
    want = [[1, 1, 1, 1, 2, 2]] * 3 + [[3, 3, 3, 3, 4, 4]]
    assert storage.read(layer, layer.weight).tolist() == want


def test_a_scale_of_another_shape_is_refused() -> None:
    layer = _scaled(torch.ones(3, 5))
    storage = storage_of(layer, layer.weight)
    assert storage is not None
    with pytest.raises(UnsupportedBase, match=r"scale of shape \(3, 5\): expected one number"):
        storage.read(layer, layer.weight)


def test_float8_takes_what_rounds_to_its_largest_value_and_no_more() -> None:
    layer = _scaled(torch.ones(()))
    storage = storage_of(layer, layer.weight)
    assert storage is not None
    assert storage.write is not None
    assert storage.write(layer, layer.weight, torch.full((4, 6), 460.0)).float().max() == 448
    with pytest.raises(MergeError, match="reaches 470 times its scale"):
        storage.write(layer, layer.weight, torch.full((4, 6), 470.0))
