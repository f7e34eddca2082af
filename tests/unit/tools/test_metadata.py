"""Metadata shown, changed and stripped, with every tensor left as it is and every hash right."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nerine
from blocky_model import Model, adapter_of
from nerine import LoRA, OFTv2
from nerine.errors import FormatError, OptionError
from nerine.tools.metadata import edit_metadata, show_metadata, strip_metadata
from sdxl_adapter import training_metadata

TENSORS = {
    "lora_unet_a.lora_up.weight": torch.randn(6, 2).half(),
    "lora_unet_a.lora_down.weight": torch.randn(2, 5).to(torch.bfloat16),
    "lora_unet_a.alpha": torch.tensor(1.0),
    "other.flag": torch.tensor([True, False]),
    "other.count": torch.arange(5),
}


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})


def data_of(file: Path) -> bytes:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return raw[8 + length :]


def assert_same_tensors(a: Path, b: Path) -> None:
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    for key, t in first.items():
        assert t.dtype == second[key].dtype
        assert torch.equal(t.reshape(-1).view(torch.uint8), second[key].reshape(-1).view(torch.uint8))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "a.safetensors", {**training_metadata(), "workflow": "{...}", "format": "pt"})
    return tmp_path / "a.safetensors"


def test_shown(file: Path) -> None:
    report = show_metadata(file)
    assert report.metadata == metadata_of(file)
    assert "ss_network_dim: 32" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["metadata"]["ss_seed"] == "42"


def test_edited(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.safetensors"
    before = file.read_bytes()
    report = edit_metadata(file, out, set={"modelspec.author": "Ann", "new": "é"}, delete=["ss_*", "workflow"])
    found = metadata_of(out)
    assert found["modelspec.author"] == "Ann"
    assert found["new"] == "é"
    assert "workflow" not in found
    assert not [key for key in found if key.startswith("ss_")]
    assert found["modelspec.title"] == "Paper Woman XL"
    assert report.set == ("modelspec.author", "new")
    assert "workflow" in report.removed
    assert report.bytes == out.stat().st_size
    assert_same_tensors(file, out)
    assert file.read_bytes() == before


def test_in_place(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(file.read_bytes())
    edit_metadata(file, None, set={"modelspec.author": "Ann"})
    assert metadata_of(file)["modelspec.author"] == "Ann"
    assert_same_tensors(file, copy)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "copy.safetensors"]


def test_a_dry_run_writes_nothing(file: Path, tmp_path: Path) -> None:
    before = file.read_bytes()
    planned = edit_metadata(file, tmp_path / "b.safetensors", set={"a": "b"}, dry_run=True)
    edit_metadata(file, None, set={"a": "b"}, dry_run=True)
    assert file.read_bytes() == before
    assert not (tmp_path / "b.safetensors").exists()
    assert edit_metadata(file, tmp_path / "b.safetensors", set={"a": "b"}).bytes == planned.bytes


def test_refusals(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.safetensors"
    with pytest.raises(OptionError, match="Did you mean 'workflow'"):
        edit_metadata(file, out, delete=["workflo"])
    with pytest.raises(OptionError, match="is not set by hand"):
        edit_metadata(file, out, set={"sshs_model_hash": "0"})
    with pytest.raises(OptionError, match="this is what is read"):
        edit_metadata(file, file, set={"a": "b"})
    out.write_bytes(b"old")
    with pytest.raises(OptionError, match="--force"):
        edit_metadata(file, out, set={"a": "b"})
    edit_metadata(file, out, set={"a": "b"}, force=True)
    assert metadata_of(out)["a"] == "b"
    torch.save(TENSORS, tmp_path / "a.pt")
    with pytest.raises(FormatError, match="pickle"):
        edit_metadata(tmp_path / "a.pt", tmp_path / "c.safetensors", set={"a": "b"})


def test_stripped(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.safetensors"
    report = strip_metadata(file, out)
    found = metadata_of(out)
    kept = {key for key in training_metadata() if key.startswith("modelspec.")} | {
        "format",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
        "ss_v2",
        "ss_base_model_version",
    }
    assert set(found) == kept
    assert set(report.removed) == set(metadata_of(file)) - kept
    private = ("ohwx", "sd_xl_base", "{...}", "1710165900")
    raw = out.read_bytes()
    assert not [word for word in private if word.encode() in raw.replace(b"ohwx woman, paper cutout", b"")]
    assert_same_tensors(file, out)
    strip_metadata(file, out, everything=True, force=True)
    assert metadata_of(out) == {"format": "pt"}


def test_all_keeps_what_the_tensors_are_read_by(tmp_path: Path) -> None:
    tensors = {
        "unet.conv_in.lora_A.weight": torch.randn(4, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.randn(16, 4, 1, 1),
    }
    settings = json.dumps({"unet.r": 4, "unet.lora_alpha": 2})
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": settings, "prompt": "x"})
    report = strip_metadata(tmp_path / "a.safetensors", tmp_path / "b.safetensors", everything=True)
    assert set(metadata_of(tmp_path / "b.safetensors")) == {"lora_adapter_metadata"}  # alpha stands nowhere else
    assert report.notes == ()
    report = edit_metadata(tmp_path / "a.safetensors", tmp_path / "c.safetensors", delete=["lora_adapter_metadata"])
    assert any("at another scale" in note for note in report.notes)


def test_a_stripped_file_computes_the_same(tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", OFTv2(block_size=4, terms=7), targets=["*attn1*"])
    strip_metadata(file, tmp_path / "b.safetensors")
    assert "nerine" in metadata_of(tmp_path / "b.safetensors")
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    results = []
    for name in ("a", "b"):
        model = Model()
        nerine.load(model, tmp_path / f"{name}.safetensors")
        results.append(model.mid_block["attentions"][0].attn1.to_q(x))
    assert torch.equal(*results)


# -- hashes ------------------------------------------------------------------------------------------------------------
def kohya_hashes(file: Path) -> tuple[str, str]:
    """As sd-scripts takes them: of the file with its ss_ metadata alone."""
    own = {key: value for key, value in metadata_of(file).items() if key.startswith("ss_")}
    bare = file.with_name("bare.safetensors")
    save_file(load_file(file), bare, own)
    raw = bare.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    bare.unlink()
    return hashlib.sha256(raw[8 + length :]).hexdigest(), hashlib.sha256(raw[2**20 : 2**20 + 2**16]).hexdigest()[:8]


def test_hashes_are_made_anew(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    tensors = {
        **TENSORS,
        "lora_unet_b.lora_up.weight": torch.randn(700, 600),
        "lora_unet_b.lora_down.weight": torch.randn(600, 20),
    }
    stale = {"sshs_model_hash": "f" * 64, "sshs_legacy_hash": "f" * 8, "modelspec.hash_sha256": "0x" + "f" * 64}
    save_file(tensors, file, {**training_metadata(), **stale})
    for number, change in enumerate(({"ss_seed": "9"}, {"modelspec.title": "x" * 500})):
        out = tmp_path / f"{number}.safetensors"
        edit_metadata(file, out, set=change)
        found, wanted = metadata_of(out), kohya_hashes(out)
        assert (found["sshs_model_hash"], found["sshs_legacy_hash"]) == wanted
        assert found["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data_of(out)).hexdigest()


def test_hashes_that_are_not_there_do_not_appear(file: Path, tmp_path: Path) -> None:
    edit_metadata(file, tmp_path / "b.safetensors", set={"a": "b"})
    assert not [key for key in metadata_of(tmp_path / "b.safetensors") if "hash" in key and "sd_model" not in key]


def test_the_hash_of_lycoris_is_of_the_tensors_and_stays(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors", {"sshs_model_hash": "0x" + "ab" * 32, "ss_seed": "1"})
    strip_metadata(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert metadata_of(tmp_path / "b.safetensors") == {"sshs_model_hash": "0x" + "ab" * 32}


# -- folders -----------------------------------------------------------------------------------------------------------
def test_a_peft_folder(tmp_path: Path) -> None:
    folder = adapter_of(tmp_path / "folder", LoRA(rank=2), dialect="peft")
    config = (folder / "adapter_config.json").read_text()
    edit_metadata(folder, None, set={"note": "in place"})
    assert show_metadata(folder).metadata["note"] == "in place"
    assert (folder / "adapter_config.json").read_text() == config
    out = tmp_path / "out"
    report = edit_metadata(folder, out, set={"note": "other"})
    assert metadata_of(out / "adapter_model.safetensors")["note"] == "other"
    assert json.loads((out / "adapter_config.json").read_text()) == json.loads(config)
    assert report.bytes == sum(p.stat().st_size for p in out.iterdir())
    nerine.load(Model(), out, strict=True)
