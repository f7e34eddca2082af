"""Embeddings put into adapter files and taken out again, bit by bit, whatever their trigger words are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nerine
from blocky_model import LAYERS, Model, adapter_of
from nerine import LoRA
from nerine.errors import FormatError, OptionError
from nerine.tools.bundle import contents, file_name, pack, unpack
from nerine.tools.embeddings import embeddings

XL = {"clip_l": torch.randn(3, 768).half(), "clip_g": torch.randn(3, 1280).half()}
ONE = torch.randn(5, 768)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return adapter_of(tmp_path / "style.safetensors", LoRA(rank=2), metadata={"modelspec.title": "style"}, hashes=True)


@pytest.fixture
def bundle(adapter: Path, tmp_path: Path) -> Path:
    save_file(XL, tmp_path / "xl.safetensors")
    save_file({"emb_params": ONE}, tmp_path / "one.safetensors")
    out = tmp_path / "both.safetensors"
    pack(adapter, out, {"ohwx": tmp_path / "xl.safetensors", "my cat": tmp_path / "one.safetensors"})
    return out


def test_packed(adapter: Path, bundle: Path) -> None:
    found, before = load_file(bundle), load_file(adapter)
    assert all(torch.equal(found[key], t) and found[key].dtype == t.dtype for key, t in before.items())
    assert torch.equal(found["bundle_emb.ohwx.clip_g"], XL["clip_g"])
    assert torch.equal(found["bundle_emb.my cat.string_to_param.*"], ONE)
    assert len(found) == len(before) + 3
    assert {word: set(own) for word, own in embeddings(bundle).items()} == {
        "ohwx": {"clip_l", "clip_g"},
        "my cat": {"string_to_param.*"},
    }
    with safe_open(bundle, "pt") as new, safe_open(adapter, "pt") as old:
        told, was = new.metadata(), old.metadata()
    assert told["modelspec.title"] == "style"
    assert told["sshs_model_hash"] != was["sshs_model_hash"]
    assert nerine.load(Model(), bundle).report.counts["layers"] == len(LAYERS)


def test_listed(bundle: Path, adapter: Path) -> None:
    found = contents(bundle)
    rows = {(e.trigger, e.name, e.tokens, e.width, e.dtype) for e in found.embeddings}
    assert rows == {
        ("ohwx", "clip_l", 3, 768, "float16"),
        ("ohwx", "clip_g", 3, 1280, "float16"),
        ("my cat", "string_to_param.*", 5, 768, "float32"),
    }
    assert "my cat" in str(found)
    assert "no embeddings" in str(contents(adapter))


def test_there_and_back(adapter: Path, bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    report = unpack(bundle, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["both.safetensors", "my cat.safetensors", "ohwx.safetensors"]
    assert {one.bytes for one in report.written} == {p.stat().st_size for p in folder.iterdir()}
    xl, one = load_file(folder / "ohwx.safetensors"), load_file(folder / "my cat.safetensors")
    assert set(xl) == {"clip_l", "clip_g"}
    assert all(torch.equal(t, XL[name]) for name, t in xl.items())
    assert set(one) == {"emb_params"}
    assert torch.equal(one["emb_params"], ONE)
    assert (folder / "both.safetensors").read_bytes() == adapter.read_bytes()  # hashes and all
    again = tmp_path / "again.safetensors"
    pack(
        folder / "both.safetensors",
        again,
        {"ohwx": folder / "ohwx.safetensors", "my cat": folder / "my cat.safetensors"},
    )
    assert again.read_bytes() == bundle.read_bytes()


def test_more_into_a_bundle(bundle: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.safetensors"
    pack(bundle, more, {"third": tmp_path / "one.safetensors"})
    assert list(embeddings(more)) == ["my cat", "ohwx", "third"]
    with pytest.raises(OptionError, match="'ohwx' already"):
        pack(bundle, tmp_path / "x.safetensors", {"ohwx": tmp_path / "one.safetensors"})


@pytest.mark.parametrize(
    "content",
    [
        {"string_to_token": {"*": 265}, "string_to_param": {"*": ONE}, "name": "cat", "step": 100},
        {"<cat>": ONE},
        {"<cat>": ONE[0]},
    ],
    ids=["AUTOMATIC1111", "diffusers", "diffusers, one token"],
)
def test_pickles_of_other_programs(content: dict, adapter: Path, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "cat.pt")
    with pytest.raises(FormatError, match="pickle"):
        pack(adapter, tmp_path / "b.safetensors", {"cat": tmp_path / "cat.pt"})
    pack(adapter, tmp_path / "b.safetensors", {"cat": tmp_path / "cat.pt"}, allow_pickle=True)
    found = embeddings(tmp_path / "b.safetensors")["cat"]["string_to_param.*"]
    assert torch.equal(found, ONE if len(found) > 1 else ONE[:1])


class Trap:
    def __reduce__(self) -> tuple:
        return (exec, ("raise SystemExit('the trap was sprung')",))


@pytest.mark.parametrize(
    "content", [{"string_to_param": Trap()}, {"a": "text"}, [ONE], {"a": torch.randn(2, 3, 4)}, {"a": torch.arange(4)}]
)
def test_what_is_no_embedding(content: object, adapter: Path, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "cat.pt")
    with pytest.raises(FormatError, match=r"cat\.pt"):
        pack(adapter, tmp_path / "b.safetensors", {"cat": tmp_path / "cat.pt"}, allow_pickle=True)
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("trigger", ["", "  ", "a.b", "a\nb", "\x1b[2J"])
def test_trigger_words_that_cannot_stand_in_a_bundle(trigger: str, adapter: Path, tmp_path: Path) -> None:
    save_file({"emb_params": ONE}, tmp_path / "one.safetensors")
    with pytest.raises(OptionError, match="trigger word"):
        pack(adapter, tmp_path / "b.safetensors", {trigger: tmp_path / "one.safetensors"})


def test_refusals(adapter: Path, bundle: Path, tmp_path: Path) -> None:
    one = {"cat": tmp_path / "one.safetensors"}
    with pytest.raises(OptionError, match="this is what is read"):
        pack(adapter, adapter, one)
    with pytest.raises(OptionError, match="--force"):
        pack(adapter, bundle, one)
    with pytest.raises(FormatError, match="found nothing"):
        pack(adapter, tmp_path / "x.safetensors", {"cat": tmp_path / "none.safetensors"})
    with pytest.raises(OptionError, match="no embeddings"):
        unpack(adapter, tmp_path / "parts")
    folder = adapter_of(tmp_path / "folder", LoRA(rank=2), dialect="peft")
    with pytest.raises(FormatError, match="PEFT folder"):
        pack(folder, tmp_path / "x.safetensors", one)
    unpack(bundle, tmp_path / "parts")
    with pytest.raises(OptionError, match="--force"):
        unpack(bundle, tmp_path / "parts")
    unpack(bundle, tmp_path / "parts", force=True)
    with pytest.raises(OptionError, match="this is what is read"):
        unpack(bundle, tmp_path, force=True)


def test_a_dry_run(adapter: Path, bundle: Path, tmp_path: Path) -> None:
    planned = unpack(bundle, tmp_path / "parts", dry_run=True)
    assert not (tmp_path / "parts").exists()
    assert unpack(bundle, tmp_path / "parts").written == planned.written
    planned = pack(adapter, tmp_path / "b.safetensors", {"cat": tmp_path / "one.safetensors"}, dry_run=True)
    assert not (tmp_path / "b.safetensors").exists()
    assert pack(adapter, tmp_path / "b.safetensors", {"cat": tmp_path / "one.safetensors"}).written == planned.written


# -- names of files ----------------------------------------------------------------------------------------------------
HOSTILE = [
    "../../evil",
    "/etc/passwd",
    "..\\evil",
    "C:\\evil",
    "con",
    "NUL",
    "a/b",
    "\u202egpj",
    "ohwx",
    "OHWX",
    "...",
    "x" * 300,
]


def test_hostile_trigger_words_stay_in_the_folder(adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter)
    for i, word in enumerate(HOSTILE):
        if "." not in word:
            tensors[f"bundle_emb.{word}.clip_l"] = torch.full((2, 768), float(i))
    (tmp_path / "inside").mkdir()
    file = tmp_path / "inside" / "evil.safetensors"
    save_file(tensors, file)
    report = unpack(file, tmp_path / "inside" / "parts")
    places = [Path(one.file) for one in report.written]
    assert all(place.parent == tmp_path / "inside" / "parts" for place in places)
    assert len({place.name.casefold() for place in places}) == len(places)
    assert sorted(p.name for p in (tmp_path / "inside").iterdir()) == ["evil.safetensors", "parts"]
    found = [load_file(place) for place in places]
    values = {float(own["clip_l"][0, 0]) for own in found if "clip_l" in own}
    assert values == {float(tensors[key][0, 0]) for key in tensors if key.startswith("bundle_emb.")}
    assert any("cannot be the name of a file" in note for note in report.notes)


@given(st.lists(st.text(max_size=130) | st.sampled_from(HOSTILE), max_size=6))
def test_names_of_files(words: list[str]) -> None:
    taken: set[str] = set()
    names = [file_name(word, taken) for word in words]
    for name in names:
        assert name
        assert name.isprintable()
        assert not set(name) & set('/\\:*?"<>|\0')
        assert not name.startswith((".", " "))
        assert not name.endswith((".", " "))
        assert len(name) < 110
        assert name.split(".")[0].lower() not in ("con", "nul", "prn", "aux", "com1", "lpt9")
    assert len({name.casefold() for name in names}) == len(names)


def test_ordinary_words_keep_their_names() -> None:
    words = ["ohwx", "my cat", "猫", "a-b_c (v2)", "style+", "crème"]
    assert [file_name(word, set()) for word in words] == words
