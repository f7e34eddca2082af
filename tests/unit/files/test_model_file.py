"""Models on disk: a file, pieces with an index, folders of diffusers and transformers, and what is wrong with some."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nerine import FormatError
from nerine.files.model_file import LEADS, ModelFile, layer_name, open_model
from nerine.files.store import write_file

INDEX = "model.safetensors.index.json"


def tensors(*names: str) -> dict[str, Tensor]:
    """A tensor for each name, no two alike."""
    return {name: torch.arange(6.0).reshape(2, 3) + 10 * i for i, name in enumerate(names)}


def write(file: Path, *names: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, tensors(*names), {"about": "a test"})
    return file


def write_index(file: Path, where: Mapping[str, object]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": dict(where)}), encoding="utf-8")
    return file


def in_pieces(folder: Path) -> Path:
    """A model in two files and its index."""
    write(folder / "model-00001-of-00002.safetensors", "a.weight", "a.bias")
    write(folder / "model-00002-of-00002.safetensors", "b.weight")
    where = {"a.weight": "model-00001-of-00002.safetensors", "a.bias": "model-00001-of-00002.safetensors"}
    return write_index(folder / INDEX, {**where, "b.weight": "model-00002-of-00002.safetensors"})


def pipeline(folder: Path) -> Path:
    """A pipeline of two models, a tokeniser and settings."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}", encoding="utf-8")
    (folder / "tokenizer" / "vocab.json").write_text("{}", encoding="utf-8")
    write(folder / "unet" / "diffusion_pytorch_model.safetensors", "conv_in.weight", "mid.to_q.weight")
    write(folder / "text_encoder" / "model.safetensors", "text_model.q.weight")
    (folder / "unet" / "config.json").write_text("{}", encoding="utf-8")
    return folder


def keys_of(path: Path) -> set[str]:
    with open_model(path) as file:
        return set(file.keys)


# -- what is read ------------------------------------------------------------------------------------------------------
def test_one_file(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", "a.weight", "b.weight")
    with open_model(path) as file:
        assert isinstance(file, ModelFile)
        assert file.keys == ("a.weight", "b.weight")
        assert torch.equal(file.read("b.weight"), tensors("a", "b")["b"])
        assert (file.shape("a.weight"), file.dtype("a.weight"), file.nbytes("a.weight")) == ((2, 3), torch.float32, 24)
        assert (file.size, file.is_folder, dict(file.metadata)) == (48, False, {"about": "a test"})
        assert "a.weight" in file
        assert "c.weight" not in file
        assert file.parts == frozenset()
        assert file.others == ()
        with pytest.raises(FormatError, match=r"model\.safetensors: has no tensor c"):
            file.read("c")


def test_an_index_and_the_folder_that_it_is_in(tmp_path: Path) -> None:
    index = in_pieces(tmp_path / "folder")
    for path in (index, index.parent):
        with open_model(path) as file:
            assert set(file.keys) == {"a.weight", "a.bias", "b.weight"}
            assert [piece.place for piece in file.pieces] == [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
            ]
            assert torch.equal(file.read("b.weight"), tensors("b")["b"])
            assert file.metadata == {}
            assert file.parts == frozenset()


def test_a_folder_of_transformers(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", "a.weight")
    for name in ("config.json", "tokenizer.json", ".gitattributes"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    write(tmp_path / ".cache" / "other.safetensors", "z.weight")
    with open_model(tmp_path) as file:
        assert file.keys == ("a.weight",)
        assert file.is_folder
        assert file.others == ("config.json", "tokenizer.json")


def test_a_pipeline(tmp_path: Path) -> None:
    with open_model(pipeline(tmp_path / "pipe")) as file:
        assert set(file.keys) == {"unet.conv_in.weight", "unet.mid.to_q.weight", "text_encoder.text_model.q.weight"}
        assert torch.equal(file.read("unet.mid.to_q.weight"), tensors("a", "b")["b"])
        assert file.parts == {"unet", "text_encoder"}
        assert set(file.others) == {"model_index.json", "tokenizer/vocab.json", "unet/config.json"}
        assert {piece.place for piece in file.pieces} == {
            "unet/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors",
        }


def test_a_part_of_a_pipeline_in_pieces(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "pipe")
    (folder / "text_encoder" / "model.safetensors").unlink()
    in_pieces(folder / "text_encoder")
    assert {"text_encoder.a.weight", "text_encoder.b.weight", "unet.conv_in.weight"} <= keys_of(folder)


@pytest.mark.parametrize("both", [True, False])
def test_a_variant_is_read_where_there_is_nothing_else(tmp_path: Path, both: bool) -> None:
    folder = pipeline(tmp_path / "pipe")
    plain = folder / "unet" / "diffusion_pytorch_model.safetensors"
    write(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors", "half.weight")
    if not both:
        plain.unlink()
    assert keys_of(folder) >= ({"unet.conv_in.weight"} if both else {"unet.half.weight"})
    assert ("unet.half.weight" in keys_of(folder)) is not both


@pytest.mark.parametrize("both", [True, False])
def test_the_index_of_a_variant(tmp_path: Path, both: bool) -> None:
    """As diffusers and transformers call it: the variant stands within, and in the names of the pieces."""
    pieces = ("m.fp16-00001-of-00002.safetensors", "m.fp16-00002-of-00002.safetensors")
    for i, name in enumerate(pieces):
        write(tmp_path / name, f"half.{i}")
    write_index(tmp_path / "m.safetensors.index.fp16.json", {f"half.{i}": name for i, name in enumerate(pieces)})
    if both:
        in_pieces(tmp_path)
    assert keys_of(tmp_path) == ({"a.weight", "a.bias", "b.weight"} if both else {"half.0", "half.1"})
    assert keys_of(tmp_path / "m.safetensors.index.fp16.json") == {"half.0", "half.1"}


def test_links_are_followed(tmp_path: Path) -> None:
    """In the cache of the Hugging Face hub every file is a link."""
    blob = write(tmp_path / "blobs" / "0123abcd", "a.weight")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(blob)
    assert keys_of(snapshot) == keys_of(snapshot / "model.safetensors") == {"a.weight"}


# -- what is not -------------------------------------------------------------------------------------------------------
def refused(path: Path, words: str, allow_pickle: bool = False) -> None:
    with pytest.raises(FormatError, match=words), open_model(path, allow_pickle=allow_pickle):
        pass


def test_a_missing_piece(tmp_path: Path) -> None:
    index = in_pieces(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(index, r"it names 2 files, and model-00002-of-00002\.safetensors is not there; download")
    refused(tmp_path, "is not there; download")


def test_a_tensor_that_is_not_in_its_piece(tmp_path: Path) -> None:
    index = in_pieces(tmp_path)
    write(tmp_path / "model-00002-of-00002.safetensors", "c.weight")
    refused(index, r"00002\.safetensors: the index says that 1 tensors are in it \(first b\.weight\)")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/model.safetensors", 7, None, ["a"]])
def test_an_index_names_files_beside_it_alone(tmp_path: Path, name: object) -> None:
    write(tmp_path / "other.safetensors", "a.weight")
    index = write_index(tmp_path / "folder" / INDEX, {"a.weight": name, "b.weight": "x.safetensors"})
    refused(index, "expected the name of a file beside it, found ")


@pytest.mark.parametrize("name", ["..", ".", ""])
def test_nor_does_it_name_folders(tmp_path: Path, name: str) -> None:
    refused(write_index(tmp_path / INDEX, {"a.weight": name}), "not there|the name of a file beside it")


@pytest.mark.parametrize(
    "text",
    ["{", "", "[]", "7", '{"metadata": {}}', '{"weight_map": []}', '{"weight_map": {}}', "[" * 9000, '"\xff\xfe'],
    ids=str,
)
def test_a_damaged_index(tmp_path: Path, text: str) -> None:
    index = tmp_path / INDEX
    index.write_bytes(text.encode("latin-1"))
    refused(index, "index of safetensors files|expected weight_map")


def test_an_index_that_is_none(tmp_path: Path) -> None:
    refused(tmp_path / INDEX, "expected the index of a model, found nothing there")


def test_names_that_come_twice(tmp_path: Path) -> None:
    first, second = write(tmp_path / "one.safetensors", "a.weight"), tmp_path / "two.safetensors"
    write(second, "a.weight", "b.weight")
    index = write_index(tmp_path / INDEX, {"a.weight": first.name, "b.weight": second.name})
    refused(index, r"a\.weight is in one\.safetensors and in two\.safetensors; remove one")


def test_two_names_for_one_layer(tmp_path: Path) -> None:
    path = write(tmp_path / "both.safetensors", "model.diffusion_model.a.weight", "diffusion_model.a.weight")
    refused(path, r"diffusion_model\.a\.weight is in both\.safetensors and in both\.safetensors")


def test_adapters_are_no_models(tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    write(folder / "adapter_model.safetensors", "base_model.model.q.lora_A.weight")
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    refused(folder, r"expected a model, found an adapter \(adapter_config\.json\)")
    lora = ("lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight", "lora_unet_a.alpha")
    for i, names in enumerate((lora, ("x.lora_A.default.weight",), ("x.hada_w1_a", "x.alpha"), ("x.lokr_w2_b",))):
        file = write(tmp_path / f"{i}.safetensors", *names)
        refused(file, r"expected a model, found an adapter \(it has ")


def test_empty_files_are_none_either(tmp_path: Path) -> None:
    refused(write(tmp_path / "nothing.safetensors"), "found a file without tensors")


def test_gguf_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "flux.gguf").write_bytes(b"GGUF" + bytes(40))
    refused(tmp_path / "flux.gguf", "GGUF is not read; give the .safetensors that it was made from")


def test_folders_in_which_nothing_is_clear(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.safetensors", "found nothing there")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "expected one .safetensors file, or an index of several, found nothing")
    write(empty / "a.safetensors", "a.weight")
    write(empty / "b.safetensors", "b.weight")
    refused(empty, r"found a\.safetensors, b\.safetensors; name the file that is meant")
    hollow = tmp_path / "hollow"
    (hollow / "unet").mkdir(parents=True)
    (hollow / "model_index.json").write_text("{}", encoding="utf-8")
    refused(hollow, "a pipeline whose folders hold no weights")


def test_damage_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", "a.weight")
    path.write_bytes(path.read_bytes()[:-3])
    refused(path, r"model\.safetensors \([\d,]+ bytes\): not a whole safetensors file")


# -- pickles -----------------------------------------------------------------------------------------------------------
def test_pickles_only_for_who_asks(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": tensors("a.weight"), "epoch": 3}, path)
    refused(path, "a pickle can run code when it is opened")
    with open_model(path, allow_pickle=True) as file:
        assert file.keys == ("a.weight",)
        assert torch.equal(file.read("a.weight"), tensors("a")["a"])


def test_safetensors_go_before_pickles(tmp_path: Path) -> None:
    torch.save(tensors("b.weight"), tmp_path / "pytorch_model.bin")
    refused(tmp_path, "a pickle can run code when it is opened")
    write(tmp_path / "model.safetensors", "a.weight")
    assert keys_of(tmp_path) == {"a.weight"}


# -- all-in-one files --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "diffusion_model.input_blocks.0.0.weight"),
        ("cond_stage_model.transformer.text_model.q.weight", "text_encoder.text_model.q.weight"),
        ("cond_stage_model.model.transformer.resblocks.0.ln_1.bias", "text_encoder.transformer.resblocks.0.ln_1.bias"),
        ("conditioner.embedders.0.transformer.text_model.q.weight", "text_encoder.text_model.q.weight"),
        ("conditioner.embedders.1.model.positional_embedding", "text_encoder_2.positional_embedding"),
        ("conditioner.embedders.0.model.text_projection", "text_encoder_2.text_projection"),  # the refiner of SDXL
        ("text_encoders.clip_g.transformer.text_model.q.weight", "text_encoder_2.text_model.q.weight"),
        ("text_encoders.t5xxl.transformer.encoder.block.0.q.weight", "text_encoder_3.encoder.block.0.q.weight"),
        ("first_stage_model.decoder.conv_in.weight", "vae.decoder.conv_in.weight"),
        ("double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.qkv.weight"),
        ("model.layers.0.q_proj.weight", "model.layers.0.q_proj.weight"),
        ("alphas_cumprod", "alphas_cumprod"),
    ],
)
def test_parts_of_all_in_one_files(key: str, name: str) -> None:
    assert layer_name(key) == name


def test_the_parts_that_such_a_file_has(tmp_path: Path) -> None:
    path = write(tmp_path / "all.safetensors", *(f"{lead}a{i}.weight" for i, lead in enumerate(LEADS)), "betas")
    with open_model(path) as file:
        assert file.parts == {"diffusion_model", "text_encoder", "text_encoder_2", "text_encoder_3", "vae"}
        assert set(file.keys) == {*(f"{lead}a{i}.weight" for i, lead in enumerate(LEADS)), "betas"}
