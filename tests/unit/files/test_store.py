"""The container: whole or not at all, the same bytes for the same content, and damage that is named."""

from __future__ import annotations

import json
import os
import stat
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from nerine import FormatError, NerineError
from nerine.files import store
from nerine.files.store import open_file, write_file

TENSORS = {
    "b.lora_up.weight": torch.arange(12.0).reshape(4, 3),
    "a.alpha": torch.tensor(1.5),
    "c.half": torch.arange(5, dtype=torch.float16),
    "c.brain": torch.arange(7, dtype=torch.bfloat16),
    "d.wide": torch.arange(3, dtype=torch.float64),
    "e.flag": torch.tensor([True, False, True]),
    "f.count": torch.arange(4),
    "g.none": torch.zeros(0, 3),
    "h.strided": torch.arange(12.0).reshape(3, 4).T[::2],
}
META = {"format": "pt", "nerine": "{}", "zebra": "ü", "apple": "1"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "adapter.safetensors"
    write_file(path, TENSORS, META)
    return path


def test_any_reader_reads_it(file: Path) -> None:
    loaded = safetensors.torch.load_file(file)
    assert loaded.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert loaded[key].dtype == tensor.dtype
        assert torch.equal(loaded[key], tensor)
    with safetensors.safe_open(file, framework="pt") as handle:
        assert handle.metadata() == META


def test_it_reads_what_it_wrote(file: Path) -> None:
    with open_file(file) as source:
        assert source.keys == tuple(sorted(TENSORS))
        assert source.metadata == META
        assert source.shape("b.lora_up.weight") == (4, 3)
        assert all(torch.equal(source.read(key), tensor) for key, tensor in TENSORS.items())


def test_the_same_content_gives_the_same_bytes(tmp_path: Path, file: Path) -> None:
    again = tmp_path / "again.safetensors"
    size = write_file(again, dict(reversed(TENSORS.items())), dict(reversed(META.items())))
    assert again.read_bytes() == file.read_bytes()
    assert size == again.stat().st_size


def test_tensors_start_at_multiples_of_their_size(file: Path) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    for key, tensor in TENSORS.items():
        assert header[key]["data_offsets"][0] % tensor.element_size() == 0


def test_permissions_are_those_of_a_new_file_or_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    before = os.umask(0o027)
    try:
        write_file(path, TENSORS, META)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        write_file(path, TENSORS, META)
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(before)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_a_format_that_files_cannot_hold(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(FormatError, match=rf"a\.x is {dtype}, which this file format cannot hold"):
        write_file(tmp_path / "a.safetensors", {"a.x": torch.zeros(2, dtype=dtype)}, {})
    assert not list(tmp_path.iterdir())


# -- what is no file -------------------------------------------------------------------------------------------------
def read_all(path: Path) -> None:
    with open_file(path) as source:
        for key in source.keys:
            source.shape(key)
            source.read(key)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"none\.safetensors: expected an adapter file, found nothing there"):
        read_all(tmp_path / "none.safetensors")
    with pytest.raises(FormatError, match="found a folder there"):
        read_all(tmp_path)
    with pytest.raises(FormatError, match=r"the folder .*deep does not exist; create it first"):
        write_file(tmp_path / "deep" / "a.safetensors", TENSORS, META)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".pkl", ".PT"])
def test_pickles_are_refused_unread(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"adapter{suffix}"
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(FormatError, match="a pickle can run code"):
        read_all(path)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_by_another_name_is_known_and_runs_nothing(tmp_path: Path, allow: bool, old: bool) -> None:
    path = tmp_path / "adapter.safetensors"
    torch.save({"a": Bomb(tmp_path / "bang")}, path, _use_new_zipfile_serialization=not old)
    with (
        pytest.raises(FormatError, match="not read as tensors alone" if allow else "a pickle can run code"),
        open_file(path, allow_pickle=allow),
    ):
        pass
    assert not (tmp_path / "bang").exists()


@pytest.mark.parametrize("inside", ["", "state_dict"])
def test_a_pickle_of_tensors_is_read_where_that_is_asked_for(tmp_path: Path, inside: str) -> None:
    path = tmp_path / "adapter.pt"
    found = {"a.lora_up.weight": torch.arange(6.0).reshape(2, 3), "ss_network_dim": "4", "step": 12}
    torch.save({inside: found} if inside else found, path)
    with open_file(path, allow_pickle=True) as source:
        assert (source.keys, source.metadata, source.ignored) == (
            ("a.lora_up.weight",),
            {"ss_network_dim": "4"},
            ("step",),
        )
        assert source.shape("a.lora_up.weight") == (2, 3)
        assert torch.equal(source.read("a.lora_up.weight"), found["a.lora_up.weight"])


def test_truncated_anywhere(tmp_path: Path, file: Path) -> None:
    data = file.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in sorted({*range(40), *range(0, len(data), 13), len(data) - 1}):
        cut.write_bytes(data[:length])
        with pytest.raises(FormatError, match=r"cut\.safetensors .*Was the download or the save interrupted"):
            read_all(cut)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 8,
        b"\xff" * 64,
        struct.pack("<Q", 2) + b"{}garbage",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}      ' + b"\0" * 4,
        struct.pack("<Q", 64) + b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}          ' + b"\0" * 4,
        struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}         ' + b"\0" * 4,
        struct.pack("<Q", 72) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[9999999,10000003]}}     ' + b"\0" * 4,
    ],
    ids=range(10),
)
def test_garbage(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "garbage.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError, match="not a whole safetensors file"):
        read_all(path)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(data)
    try:
        read_all(path)
    except NerineError:
        return


# -- interruptions ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("at", ["header", "tensor", "fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), MemoryError])
def test_an_interruption_leaves_the_old_file_whole(
    file: Path, monkeypatch: pytest.MonkeyPatch, at: str, error: BaseException
) -> None:
    before = file.read_bytes()
    calls = 0

    def fail(*args: object) -> object:
        nonlocal calls
        calls += 1
        if at != "tensor" or calls == 3:
            raise error
        return memoryview(b"1234")

    target, name = {
        "header": (store, "_header"),
        "tensor": (store, "_bytes"),
        "fsync": (os, "fsync"),
        "replace": (os, "replace"),
    }[at]
    monkeypatch.setattr(target, name, fail)
    with pytest.raises(error if isinstance(error, type) else OSError):
        write_file(file, {k: t + 1 for k, t in TENSORS.items() if t.dtype != torch.bool}, META)
    monkeypatch.undo()
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name], "rubbish left behind"


KILLED = """
    import os, signal, sys, time, torch
    from nerine.files.store import open_file, write_file

    def write(value):
        write_file(sys.argv[1], {f"k{i}": torch.full((200, 200), value) for i in range(6)}, {"value": str(value)})

    write(0.0)
    seen = set()
    for i in range(10):
        child = os.fork()
        if not child:
            while True:
                write(i + 0.25)
                write(i + 0.5)
        time.sleep(0.004 + 0.0037 * i)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open_file(sys.argv[1]) as source:
            value = float(source.metadata["value"])
            assert all((source.read(key) == value).all() for key in source.keys), value
        seen.add(value)
    assert len(seen) > 2, seen
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    """Ten writers in turn, each killed in the midst of its work."""
    code = "import torch; torch.set_num_threads(1)\n" + textwrap.dedent(KILLED)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "adapter.safetensors")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
