"""Files that once broke something other than themselves: each is now refused in words, and the model is untouched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nerine
from nerine import BOFT, FormatError, OFTv2, ShapeError
from nerine.algorithms import Algorithm
from nerine.axes import Layout, Spec, bind
from nerine.files.store import write_file


def model_of() -> nn.ModuleDict:
    torch.manual_seed(3)
    return nn.ModuleDict({"lin": nn.Linear(8, 6), "emb": nn.Embedding(10, 8), "norm": nn.LayerNorm(6)})


def refused(tmp_path: Path, tensors: Mapping[str, Tensor], words: str, kind: type[Exception] = ShapeError) -> None:
    model = model_of()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    write_file(tmp_path / "a.safetensors", tensors, {})
    with pytest.raises(kind, match=words):
        nerine.load(model, tmp_path / "a.safetensors")
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_a_mark_without_a_number(tmp_path: Path) -> None:
    tensors = {"lycoris_lin.weight": torch.ones(6), "lycoris_lin.on_input": torch.zeros(0)}
    refused(tmp_path, tensors, "no complete adapter", FormatError)


@pytest.mark.parametrize("mark", [2**63 + 1, 0])
def test_a_mark_in_any_format(tmp_path: Path, mark: int) -> None:
    on_input = torch.tensor(mark, dtype=torch.uint64)
    ones = torch.ones(8 if mark else 6)  # fits one side of the layer alone
    write_file(tmp_path / "a.safetensors", {"lycoris_lin.weight": ones, "lycoris_lin.on_input": on_input}, {})
    (row,) = nerine.load(model_of(), tmp_path / "a.safetensors").report.rows
    assert row.algorithm == "IA3"


@pytest.mark.parametrize("halves", [2, 4, 1])
def test_blocks_whose_upper_half_has_another_size(tmp_path: Path, halves: int) -> None:
    tensors = {"lycoris_lin.oft_R.weight": torch.ones(2, halves)}
    refused(tmp_path, tensors, r"blocks of 4 x 4 have 6 entries above the diagonal, and oft_R\.weight has")


@pytest.mark.parametrize("shape", [(6, 6, 1, 1), (1, 3, 2, 2), (2, 1, 6, 6), (3, 2, 3, 3)])
def test_blocks_that_are_no_butterfly(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {"lycoris_lin.oft_blocks": torch.ones(shape), "lycoris_lin.alpha": torch.tensor(0.0)}
    refused(tmp_path, tensors, "lin.oft_blocks")
    with pytest.raises(ShapeError, match="expected a power of two of blocks"):
        bind(BOFT().layouts[0], {"blocks": shape}, {"out": 6, "in": 8}, "lin")


@pytest.mark.parametrize("algorithm", [BOFT(block_size=2), BOFT(block_size=3, stages=1), OFTv2(block_size=4)], ids=str)
def test_what_is_written_passes_these_checks(tmp_path: Path, algorithm: Algorithm) -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(12, 6), "c": nn.Linear(8, 5)})
    network = nerine.attach(model, algorithm)
    nerine.save(network, tmp_path / "a.safetensors")
    network.detach()
    assert len(nerine.load(model, tmp_path / "a.safetensors").report.rows) == 3


@pytest.mark.parametrize("shape", [(0, 6), (0, 0), (2, 0)])
def test_no_blocks_at_all(tmp_path: Path, shape: tuple[int, ...]) -> None:
    refused(tmp_path, {"lycoris_lin.oft_R.weight": torch.ones(shape)}, "lin")


def test_one_axis_too_many_where_none_of_the_kernel_is(tmp_path: Path) -> None:
    layout = Layout({"w": Spec("?1 out *1", "weight")}, alpha="")
    for shape, known in (((4,), {}), ((1, 4, 1, 1), {"k0": 3, "k1": 2})):
        assert bind(layout, {"w": shape}, {"out": 4, "in": 2, **known}, "x")["out"] == 4
    for shape, known in (((4, 8), {}), ((1, 4), {}), ((1, 4), {"k0": 3}), ((1, 4, 1, 1), {"k0": 3})):
        with pytest.raises(ShapeError, match=r"x\.weight: expected \d axes"):
            bind(layout, {"w": shape}, {"out": 4, "in": 2, **known}, "x")
    tensors = {"lycoris_emb.weight": torch.ones(4, 8), "lycoris_emb.on_input": torch.tensor(0)}
    refused(tmp_path, tensors, "emb")


def test_a_norm_has_no_magnitudes(tmp_path: Path) -> None:
    tensors = {"lycoris_norm.w_norm": torch.ones(6), "lycoris_norm.dora_scale": torch.ones(6)}
    refused(tmp_path, tensors, "has no magnitudes")


@pytest.mark.parametrize("rows", ["8:1", "4:4", f"0:{10**20}", f"{'9' * 5000}:{'9' * 5001}", "0:7"])
def test_rows_that_are_none(tmp_path: Path, rows: str) -> None:
    tensors = {f"lycoris_lin[{rows}].lora_up.weight": torch.ones(4, 2), f"lycoris_lin[{rows}].alpha": torch.tensor(1.0)}
    refused(tmp_path, tensors, "none of its 2 keys belongs to this model", FormatError)


@pytest.mark.parametrize("alpha", [1e31, -1e31, float("nan"), float("-inf")])
def test_an_alpha_beyond_all_measure(tmp_path: Path, alpha: float) -> None:
    stem = "lycoris_lin"
    number = torch.tensor(alpha, dtype=torch.float64)
    lora = {f"{stem}.lora_up.weight": torch.ones(6, 2), f"{stem}.lora_down.weight": torch.ones(2, 8)}
    refused(tmp_path, {**lora, f"{stem}.alpha": number}, "the file is damaged", FormatError)
    oft = {f"{stem}.oft_blocks": torch.ones(3, 2, 2)}
    refused(tmp_path, {**oft, f"{stem}.alpha": number}, "the file is damaged", FormatError)


def settings(**changes: Any) -> dict[str, str]:
    own = {"semantics": 1, "version": "1", "algorithms": [{"algorithm": "lora"}], "layers": {"lin": 0}, **changes}
    return {"nerine": json.dumps(own)}


def test_settings_that_would_take_for_ever(tmp_path: Path) -> None:
    """The series of OFTv2 has as many terms as its settings say."""
    metadata = settings(algorithms=[{"algorithm": "oft-v2", "block_size": 2, "terms": 2**31}])
    write_file(tmp_path / "a.safetensors", {"lycoris_lin.oft_R.weight": torch.ones(4, 1)}, metadata)
    model = model_of()
    network = nerine.load(model, tmp_path / "a.safetensors")
    assert "terms must be 0 (exact) or a whole number from 4 to 100, got 2147483648" in str(network.report)
    assert model["lin"](torch.ones(8)).isfinite().all()


NAME = "lycoris_\x1b[31mred\u202e.alpha"


@pytest.mark.parametrize(
    "metadata",
    [
        settings(),
        settings(algorithms=[{"algorithm": "\x1b[31m"}]),
        settings(layers={"\x1b[31m": 0}),
        settings(algorithms=[{"algorithm": "lora", "\x1b[31m": 1}]),
        {"nerine": "\x1b[31m"},
    ],
    ids=range(5),
)
def test_reports_and_errors_have_no_control_characters(tmp_path: Path, metadata: dict[str, str]) -> None:
    file = tmp_path / "a.safetensors"
    good = {"lycoris_lin.lora_up.weight": torch.ones(6, 2), "lycoris_lin.lora_down.weight": torch.ones(2, 8)}
    write_file(file, {**good, NAME: torch.tensor(1.0)}, metadata)
    report = nerine.load(model_of(), file).report
    texts = [str(report)]
    with pytest.raises(FormatError) as caught:
        nerine.load(model_of(), file, strict=True)
    texts.append(str(caught.value))
    write_file(file, {NAME: torch.tensor(1.0)}, metadata)
    with pytest.raises(FormatError) as caught:
        nerine.load(model_of(), file)
    texts.append(str(caught.value))
    for text in texts:
        assert r"\x1b[31mred\u202e" in text
        assert all(c.isprintable() or c == "\n" for c in text)
    assert NAME in report.unmatched, "a program gets the name as it is"


def test_the_version_of_a_newer_file_has_none_either(tmp_path: Path) -> None:
    write_file(tmp_path / "a.safetensors", {"a": torch.ones(1)}, settings(semantics=10**300, version="\x1b" * 1000))
    with pytest.raises(FormatError, match=r"written by nerine \\x1b") as caught:
        nerine.load(model_of(), tmp_path / "a.safetensors")
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 500
