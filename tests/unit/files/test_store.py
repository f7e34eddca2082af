"""The container: whole or not at all, the same bytes for the same content, and damage that is named."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import struct
import subprocess
import sys
import textwrap
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from nerine import FormatError, NerineError
from nerine.files import store
from nerine.files.atomic import write_json, write_text
from nerine.files.store import Outgoing, Source, open_file, write_file

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
    "i.eight": torch.arange(5.0).to(torch.float8_e4m3fn),
    "i.other": torch.arange(5.0).to(torch.float8_e5m2),
    "j.small": torch.arange(5, dtype=torch.int8),
    "k.unsigned": torch.arange(5).to(torch.uint16),
}
META = {"format": "pt", "nerine": "{}", "zebra": "ü", "apple": "1"}


def is_same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """The same format, shape and bits."""
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (got, want)]
    return got.dtype == want.dtype and got.shape == want.shape and torch.equal(*bits)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "adapter.safetensors"
    write_file(path, TENSORS, META)
    return path


def test_any_reader_reads_it(file: Path) -> None:
    loaded = safetensors.torch.load_file(file)
    assert loaded.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert is_same(loaded[key], tensor)
    with safetensors.safe_open(file, framework="pt") as handle:
        assert handle.metadata() == META


def test_it_reads_what_it_wrote(file: Path) -> None:
    with open_file(file) as source:
        assert source.keys == tuple(sorted(TENSORS))
        assert source.metadata == META
        assert source.shape("b.lora_up.weight") == (4, 3)
        assert source.ignored == {}
        for key, tensor in TENSORS.items():
            assert is_same(source.read(key), tensor)
            assert source.dtype(key) == tensor.dtype
            assert source.nbytes(key) == tensor.numel() * tensor.element_size()


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


def test_a_format_that_files_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"a\.x is torch\.complex128, which this file format cannot hold"):
        write_file(tmp_path / "a.safetensors", {"a.x": torch.zeros(2, dtype=torch.complex128)}, {})
    assert not list(tmp_path.iterdir())


# -- memory ----------------------------------------------------------------------------------------------------------
def test_what_was_read_does_not_change_with_the_file(file: Path) -> None:
    with open_file(file) as source:
        read = {key: source.read(key) for key in source.keys}
    with file.open("r+b") as other:
        size = file.stat().st_size
        other.write(b"\xff" * size)
    assert all(is_same(read[key], tensor) for key, tensor in TENSORS.items())
    with file.open("r+b") as other:
        other.truncate(0)
    assert all(is_same(read[key], tensor) for key, tensor in TENSORS.items())


@pytest.mark.parametrize("what", ["cut", "emptied", "overwritten"])
def test_a_file_that_changes_while_it_is_open(file: Path, what: str) -> None:
    with open_file(file) as source:
        source.read("b.lora_up.weight")
        with file.open("r+b") as other:
            if what == "overwritten":
                other.write(b"\xff" * 8)
            else:
                other.truncate(0 if what == "emptied" else file.stat().st_size - 1)
        os.utime(file, ns=(1, 1))
        with pytest.raises(FormatError, match=r"changed while it was open, so b\.lora_up\.weight cannot be read"):
            source.read("b.lora_up.weight")


def test_each_tensor_has_memory_of_its_own(file: Path) -> None:
    with open_file(file) as source:
        first, again = source.read("b.lora_up.weight"), source.read("b.lora_up.weight")
    assert first.untyped_storage().nbytes() == first.numel() * 4
    first.fill_(7)
    assert is_same(again, TENSORS["b.lora_up.weight"])


def test_a_replaced_file_is_still_read_whole(file: Path) -> None:
    """Saving over a file that another part of the program has open."""
    with open_file(file) as source:
        write_file(file, {"other": torch.ones(3)}, {})
        assert is_same(source.read("b.lora_up.weight"), TENSORS["b.lora_up.weight"])
    assert read_all(file).keys() == {"other"}


def test_a_truth_is_true_or_false(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_file(path, {"a": torch.tensor([False, True, True])}, {})
    data = path.read_bytes()
    path.write_bytes(data[:-3] + b"\x00\x80\x02")
    assert read_all(path)["a"].view(torch.uint8).tolist() == [0, 1, 1]


def test_memory_as_a_source() -> None:
    source = Source.of(TENSORS, META, "the host")
    assert source.keys == tuple(sorted(TENSORS))
    assert source.metadata == META
    for key, tensor in TENSORS.items():
        read = source.read(key)
        assert is_same(read, tensor)
        assert read.is_contiguous()
        assert (source.shape(key), source.dtype(key)) == (tuple(tensor.shape), tensor.dtype)
        assert source.nbytes(key) == tensor.numel() * tensor.element_size()
        assert read.data_ptr() != tensor.data_ptr() or not tensor.numel()
    parameter = torch.nn.Parameter(torch.ones(2))
    assert not Source.of({"a": parameter}).read("a").requires_grad
    with pytest.raises(FormatError, match="the host: a is on meta"):
        Source.of({"a": torch.ones(2, device="meta")}, path="the host").read("a")


def test_a_name_that_is_not_there(file: Path) -> None:
    with open_file(file) as source:
        for ask in (source.read, source.shape, source.dtype, source.nbytes):
            with pytest.raises(FormatError, match=r"has no tensor x\\n"):
                ask("x\n")


def test_big_endian_machines_are_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(FormatError, match="low bytes first"):
        read_all(file)
    with pytest.raises(FormatError, match="low bytes first"):
        write_file(file, TENSORS, META)


# -- one tensor at a time --------------------------------------------------------------------------------------------
def test_announced_tensors_give_the_same_bytes(tmp_path: Path, file: Path) -> None:
    path = tmp_path / "announced.safetensors"
    outgoing = (Outgoing(key, tuple(t.shape), t.dtype, lambda t=t: t) for key, t in TENSORS.items())
    assert write_file(path, outgoing, META) == file.stat().st_size
    assert path.read_bytes() == file.read_bytes()


def test_announced_tensors_are_made_in_turn_and_freed(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def make(i: int) -> torch.Tensor:
        assert not [ref for ref in alive if ref() is not None], "the one before is still there"
        tensor = torch.full((10,), float(i))
        alive.append(weakref.ref(tensor))
        return tensor

    path = tmp_path / "a.safetensors"
    write_file(path, [Outgoing(f"k{i}", (10,), torch.float32, partial(make, i)) for i in range(5)], {}, hashes=True)
    assert len(alive) == 5
    assert {key: t[0].item() for key, t in read_all(path).items()} == {f"k{i}": i for i in range(5)}


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (torch.ones(3), r"came as torch\.float32 of shape \(3,\)"),
        (torch.ones(2, dtype=torch.float64), r"came as torch\.float64 of shape \(2,\)"),
        (torch.ones(2, device="meta"), "has no values to write: it is on meta"),
        (torch.ones(2).to_sparse(), "layout torch.sparse_coo"),
    ],
    ids=["shape", "format", "meta", "sparse"],
)
@pytest.mark.no_device_guard
def test_a_tensor_that_is_not_what_was_announced(file: Path, made: torch.Tensor, words: str) -> None:
    before = file.read_bytes()
    with pytest.raises(FormatError, match=words):
        write_file(file, [Outgoing("a", (2,), torch.float32, lambda: made)], META)
    assert file.read_bytes() == before
    assert len(list(file.parent.iterdir())) == 1


def test_a_name_twice_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    outgoing = [Outgoing("a", (2,), torch.float32, lambda: pytest.fail("made")) for _ in range(2)]
    with pytest.raises(FormatError, match="a would be written twice"):
        write_file(tmp_path / "a.safetensors", outgoing, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "shown",
    [
        torch.arange(12.0).reshape(3, 4)[:, 1::2],
        torch.view_as_complex(torch.arange(24.0).reshape(3, 4, 2)).conj().imag,  # with a minus still to be done
        torch.nn.Parameter(torch.arange(4.0)),
    ],
    ids=["strided", "negative", "trained"],
)
def test_views_are_written_as_what_they_show(tmp_path: Path, shown: torch.Tensor) -> None:
    write_file(tmp_path / "a.safetensors", {"a": shown}, {})
    assert torch.equal(read_all(tmp_path / "a.safetensors")["a"], shown)


# -- what is no file -------------------------------------------------------------------------------------------------
def read_all(path: Path, allow_pickle: bool = False) -> dict[str, torch.Tensor]:
    with open_file(path, allow_pickle=allow_pickle) as source:
        return {key: source.read(key) for key in source.keys}


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


def test_a_pickle_by_another_name_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "bang"),)

    path = tmp_path / "adapter.safetensors"
    torch.save(Bomb(), path)
    with pytest.raises(FormatError, match="a pickle can run code"):
        read_all(path)
    with pytest.raises(FormatError, match="cannot be read as a PyTorch file of tensors alone"):
        read_all(path, allow_pickle=True)
    assert not (tmp_path / "bang").exists()


SPECIAL = {"a.x": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


@pytest.mark.parametrize("nest", [None, "state_dict", "module"])
@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.safetensors"])
def test_pickles_are_read_where_they_are_allowed(tmp_path: Path, nest: str | None, old: bool, name: str) -> None:
    beside = {"title": "me", "epoch": 3, "optimizer": {"lr": [1]}, 7: torch.ones(1)}
    content = {**SPECIAL, **beside} if nest is None else {nest: SPECIAL, **beside}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=not old)
    with pytest.raises(FormatError, match="a pickle can run code"), open_file(tmp_path / name):
        pass
    with open_file(tmp_path / name, allow_pickle=True) as source:
        assert source.keys == ("a.x", "b")
        assert all(is_same(source.read(key), t) for key, t in SPECIAL.items())
        assert (source.shape("a.x"), source.dtype("b"), source.nbytes("b")) == ((2, 3), torch.bfloat16, 4)
        assert source.metadata == {"title": "me", "epoch": "3"}
        assert source.ignored.keys() == {"optimizer", "7"}


def test_a_safetensors_file_by_the_name_of_a_pickle(tmp_path: Path, file: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(file.read_bytes())
    with pytest.raises(FormatError, match="a pickle can run code"):
        read_all(path)
    assert read_all(path, allow_pickle=True).keys() == TENSORS.keys()


def test_a_header_that_is_as_long_as_a_pickle_is_old(tmp_path: Path) -> None:
    """640 is 80 02 in bytes, with which pickles begin."""
    path = tmp_path / "a.safetensors"
    for pad in range(1000):
        write_file(path, {"a": torch.ones(1)}, {"x": "y" * pad})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    else:
        pytest.fail("never that long")
    assert read_all(path).keys() == {"a"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(2)], "expected a dictionary of tensors, found list"),
        (torch.ones(2), "expected a dictionary of tensors, found Tensor"),
        ({"a": torch.ones(2).to_sparse()}, "expected a plain tensor"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "expected a plain tensor"),
        ({"a": torch.ones(2, device="meta")}, "expected a plain tensor"),
        ({"a": torch.ones(1).expand(10**9)}, "the file has fewer numbers"),
        ({"a": object}, "tensors alone"),
    ],
    ids=range(7),
)
@pytest.mark.no_device_guard
def test_pickles_that_are_no_adapters(tmp_path: Path, content: object, words: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(FormatError, match=words):
        read_all(tmp_path / "a.pt", allow_pickle=True)


@given(st.data())
def test_a_damaged_pickle_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    torch.save(SPECIAL, path, _use_new_zipfile_serialization=data.draw(st.booleans()))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]) if data.draw(st.booleans()) else content)
    with contextlib.suppress(NerineError):
        read_all(path, allow_pickle=True)


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


def test_a_file_that_may_not_be_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(FormatError, match=r"cannot be opened \(Permission denied\)"):
        read_all(file)


def test_no_file_at_all(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="found something else there"):
        read_all(tmp_path / "pipe")
    with pytest.raises(FormatError, match="found a folder there"):
        write_file(tmp_path, TENSORS, META)


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
        "header": (store, "render_header"),
        "tensor": (store, "_bytes"),
        "fsync": (os, "fsync"),
        "replace": (os, "replace"),
    }[at]
    monkeypatch.setattr(target, name, fail)
    with pytest.raises(error if isinstance(error, type) else OSError):
        write_file(file, {k: t.clone() for k, t in TENSORS.items() if k != "b.lora_up.weight"}, META)
    monkeypatch.undo()
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name], "rubbish left behind"


def stale(file: Path, held: bool = False) -> Path:
    """What a killed writer of `file` leaves, or has under way."""
    found: list[Path] = []
    code = """
        import os, sys, signal, torch
        from nerine.files.store import Outgoing, write_file
        def stop():
            print("here", flush=True)
            input() if sys.argv[2] == "held" else os.kill(os.getpid(), signal.SIGKILL)
        write_file(sys.argv[1], [Outgoing("a", (1,), torch.float32, stop)], {})
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(file), "held" if held else ""],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == b"here\n"
    found = [p for p in file.parent.iterdir() if p.suffix == ".part"]
    assert len(found) == 1
    if held:
        write_file(file, TENSORS, META)
        assert found[0].exists(), "taken from a living writer"
    child.kill()
    child.wait()
    child.stdin.close()
    child.stdout.close()
    return found[0]


@pytest.mark.skipif(os.name != "posix", reason="needs file locks")
@pytest.mark.parametrize("held", [False, True], ids=["killed", "held"])
def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path, held: bool) -> None:
    file = tmp_path / "a.safetensors"
    left = stale(file, held)
    assert left.exists()
    others = [tmp_path / ".b.safetensors.abcdefgh.part", tmp_path / ".a.safetensors.part", tmp_path / "a.part"]
    for other in others:
        other.write_bytes(b"")
    write_file(file, TENSORS, META)
    assert sorted(tmp_path.iterdir()) == sorted([file, *others])


def test_the_longest_name_that_a_file_can_have(tmp_path: Path) -> None:
    for name in ("x" * 255, "ü" * 127):
        write_file(tmp_path / name, TENSORS, META)
        assert read_all(tmp_path / name).keys() == TENSORS.keys()
    assert len(list(tmp_path.iterdir())) == 2


def test_many_writers_at_once(tmp_path: Path) -> None:
    """Each clears away what it takes for dead, and none of them is."""
    file = tmp_path / "a.safetensors"

    def write(value: int) -> None:
        for _ in range(25):
            write_file(file, {"a": torch.full((100,), float(value))}, {"value": str(value)})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    with open_file(file) as source:
        assert (source.read("a") == float(source.metadata["value"])).all()
    assert list(tmp_path.iterdir()) == [file]


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


# -- text ------------------------------------------------------------------------------------------------------------
def test_json_is_written_whole_and_the_same_each_time(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    data = {"r": 8, "peft_type": "LORA", "ü": [1.5, None, True]}
    size = write_json(path, data)
    first = path.read_bytes()
    assert size == len(first)
    assert json.loads(first) == data
    write_json(path, dict(reversed(data.items())))
    assert path.read_bytes() == first
    for bad in ({"a": object()}, {"a": float("nan")}, {"a": 1, 2: 3}):
        with pytest.raises(FormatError, match="expected data that JSON can hold"):
            write_json(path, bad)
    with pytest.raises(FormatError, match="cannot be written in UTF-8"):
        write_text(path, "\ud800")
    with pytest.raises(FormatError, match="does not exist; create it first"):
        write_json(tmp_path / "deep" / "a.json", {})
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
