"""Digests that are remembered from run to run, and what is kept of encoders: only as long as it is true."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from nerine.errors import FormatError
from nerine.train.batch import Picture
from nerine.train.data import cache as caching
from nerine.train.data import feed as feeding
from nerine.train.data.buckets import Buckets
from nerine.train.data.cache import Cache, Digests
from nerine.train.data.feed import Feed, Prepared
from nerine.train.data.order import Order
from nerine.train.families import Base, family_of
from nerine.train.randomness import Dice
from nerine.train.settings import DataSettings
from tiny_pipelines import PIPELINES


@pytest.fixture
def base() -> Base:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return family_of(PIPELINES["sd"]())


def order(folder: Path, count: int = 6, **more: Any) -> Order:
    sizes, pictures = [(40, 24), (24, 40), (30, 30)], []
    for n in range(count):
        width, height = sizes[n % 3]
        levels = numpy.random.default_rng(n).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
        Image.fromarray(levels).save(folder / f"{n}.png")
        pictures.append(Picture(folder / f"{n}.png", f"caption {n % 2}", (width, height), **more))
    return Order(pictures, Buckets(16, 8), 4, Dice(3))


def feed(base: Base, own: Order, folder: Path, **data: Any) -> tuple[Feed, Prepared]:
    made = Feed(base, own, DataSettings(**data), folder)
    return made, made.prepare()


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(file: Path) -> str:
        raise AssertionError(f"{file} is read once more")

    monkeypatch.setattr(caching, "_digest", never)


# -- digests -----------------------------------------------------------------------------------------------------------
def test_digests_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, kept = tmp_path / "é.png", tmp_path / "deep" / "digests.json"
    file.write_bytes(b"one")
    first = Digests(kept)
    assert first.of(file) == hashlib.sha256(b"one").hexdigest()
    first.save()
    forbid_reading(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert Digests(kept).of(Path("é.png")) == hashlib.sha256(b"one").hexdigest()


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_file_that_changed_has_another_digest(tmp_path: Path, change: str) -> None:
    file, kept = tmp_path / "a", tmp_path / "digests.json"
    file.write_bytes(b"one")
    first = Digests(kept)
    first.of(file)
    first.save()
    stat = file.stat()
    new = b"three" if change == "size" else b"two"
    file.write_bytes(new)
    later = stat.st_mtime_ns if change == "size" else stat.st_mtime_ns + 1_000_000
    os.utime(file, ns=(stat.st_atime_ns, later))
    assert first.of(file) == hashlib.sha256(new).hexdigest()
    assert Digests(kept).of(file) == hashlib.sha256(new).hexdigest()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"a": 1}', '{"a": [1, 2]}', '{"a": [1, "x", "y"]}', '{"a": [Infinity, 1, "x"]}', "[" * 100_000],
    ids=range(8),
)
def test_damaged_digests_are_made_anew(tmp_path: Path, text: str) -> None:
    file, kept = tmp_path / "a", tmp_path / "digests.json"
    file.write_bytes(b"one")
    kept.write_text(text)
    digests = Digests(kept)
    assert digests.of(file) == hashlib.sha256(b"one").hexdigest()
    digests.save()
    assert len(json.loads(kept.read_text())) == 1


def test_digests_are_written_only_where_something_is_new(tmp_path: Path) -> None:
    file, kept = tmp_path / "a", tmp_path / "digests.json"
    file.write_bytes(b"one")
    digests = Digests(kept)
    digests.save()
    assert not kept.exists()
    digests.of(file)
    digests.save()
    kept.unlink()
    digests.of(file)
    digests.save()
    assert not kept.exists()


def test_digests_of_files_with_any_name_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, kept = tmp_path / os.fsdecode(b"\xff.png"), tmp_path / "digests.json"
    try:
        file.write_bytes(b"one")
    except OSError:
        pytest.skip("this disk has names in UTF-8 only")
    first = Digests(kept)
    first.of(file)
    first.save()
    forbid_reading(monkeypatch)
    assert Digests(kept).of(file) == hashlib.sha256(b"one").hexdigest()


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"gone\.png: the picture cannot be read"):
        Digests().of(tmp_path / "gone.png")


# -- from run to run ---------------------------------------------------------------------------------------------------
def test_a_second_run_reads_no_pictures(tmp_path: Path, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    own = order(tmp_path, flip=True)
    first, told = feed(base, own, tmp_path / "c")
    assert told == Prepared(pictures=12, pictures_kept=0, captions=2, captions_kept=0)
    expected = first.batch(own.batch(0))
    forbid_reading(monkeypatch)
    monkeypatch.setattr(feeding, "read_picture", lambda *_: pytest.fail("a picture is read once more"))
    second, told = feed(base, own, tmp_path / "c")
    assert told == Prepared(pictures=0, pictures_kept=12, captions=0, captions_kept=2)
    assert torch.equal(second.batch(own.batch(0)).latents.mean, expected.latents.mean)
    assert second.damaged == 0


@pytest.mark.parametrize("way", ["memory", "off"])
def test_without_latents_on_the_disk_no_digests_are(tmp_path: Path, base: Base, way: str) -> None:
    feed(base, order(tmp_path), tmp_path / "c", cache_latents=way)
    assert not (tmp_path / "c" / "digests.json").exists()
    feed(base, order(tmp_path), tmp_path / "c", cache_latents="disk")
    assert (tmp_path / "c" / "digests.json").exists()


@pytest.mark.parametrize("name", ["scaling_factor", "shift_factor"])
def test_another_scaling_of_the_vae_makes_latents_stale(tmp_path: Path, base: Base, name: str) -> None:
    own = order(tmp_path)
    feed(base, own, tmp_path / "c")
    assert base.vae is not None
    base.vae.register_to_config(**{name: 0.7})
    _, told = feed(base, own, tmp_path / "c")
    assert (told.pictures, told.pictures_kept, told.captions) == (6, 0, 0)


def test_latents_after_another_scaling_are_those_without_a_cache(tmp_path: Path, base: Base) -> None:
    own = order(tmp_path)
    feed(base, own, tmp_path / "c")
    assert base.vae is not None
    base.vae.register_to_config(scaling_factor=base.vae.config.scaling_factor * 3)
    kept, _ = feed(base, own, tmp_path / "c")
    fresh, _ = feed(base, own, tmp_path / "c", cache_latents="off")
    draws = own.batch(0)
    assert torch.allclose(kept.batch(draws).latents.mean, fresh.batch(draws).latents.mean, atol=1e-5)


def test_another_length_of_the_tokenizer_makes_captions_stale(tmp_path: Path, base: Base) -> None:
    own = order(tmp_path)
    feed(base, own, tmp_path / "c")
    base.pipeline.tokenizer.model_max_length -= 1
    _, told = feed(base, own, tmp_path / "c")
    assert (told.pictures, told.captions, told.captions_kept) == (0, 2, 0)


def test_two_processes_share_the_work(tmp_path: Path, base: Base) -> None:
    own = order(tmp_path)
    ranks = [Feed(base, own, DataSettings(), tmp_path / "c") for _ in range(2)]
    assert ranks[0].prepare(rank=0, world=2) == Prepared(3, 0, 1, 0)
    assert ranks[1].prepare(rank=1, world=2) == Prepared(3, 3, 1, 1)  # late as it is, nothing is left to nobody
    assert feed(base, own, tmp_path / "c")[1] == Prepared(0, 6, 0, 2)


def test_damaged_entries_are_counted(tmp_path: Path, base: Base) -> None:
    own = Order(order(tmp_path).pictures, Buckets(16, 8), 3, Dice(3))
    assert own.filled == 0
    feed(base, own, tmp_path / "c")
    for file in (tmp_path / "c").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:9])
    again, _ = feed(base, own, tmp_path / "c")
    for number in range(own.per_epoch):
        again.batch(own.batch(number))
    assert again.damaged == 8
    for number in range(own.per_epoch):
        again.batch(own.batch(number))
    assert again.damaged == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_is_gone_is_named_in_preparing(tmp_path: Path, base: Base, workers: int) -> None:
    own = order(tmp_path)
    own.pictures[3].file.unlink()
    with pytest.raises(FormatError, match=r"3\.png: the picture cannot be read"):
        feed(base, own, tmp_path / "c", workers=workers)
    assert not [t for t in threading.enumerate() if "ThreadPoolExecutor" in t.name]


# -- speed -------------------------------------------------------------------------------------------------------------
def test_large_pictures_are_encoded_few_at_once(tmp_path: Path, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    own, counts, encode = order(tmp_path, 15), [], type(base).encode_pictures

    def counted(self: Base, pixels: torch.Tensor) -> Any:
        counts.append(pixels.shape)
        return encode(self, pixels)

    monkeypatch.setattr(type(base), "encode_pictures", counted)
    feed(base, own, tmp_path / "a")
    assert [shape[0] for shape in counts] == [8, 7]
    counts.clear()
    monkeypatch.setattr(feeding, "PIXELS_AT_ONCE", 2 * 16 * 16)
    feed(base, own, tmp_path / "b")
    assert [shape[0] for shape in counts] == [2] * 7 + [1]
    counts.clear()
    monkeypatch.setattr(feeding, "PIXELS_AT_ONCE", 1)
    feed(base, own, tmp_path / "d")
    assert [shape[0] for shape in counts] == [1] * 15  # even one that has more


def test_threads_read_pictures_and_captions(tmp_path: Path, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    own, pictures, kept = order(tmp_path), set(), set()
    read, get = feeding.read_picture, Cache.get

    def reading(*what: Any) -> torch.Tensor:
        pictures.add(threading.current_thread())
        return read(*what)

    def getting(self: Cache, key: str) -> Any:
        kept.add((self.folder and self.folder.name, threading.current_thread()))
        return get(self, key)

    monkeypatch.setattr(feeding, "read_picture", reading)
    monkeypatch.setattr(Cache, "get", getting)
    one, _ = feed(base, own, tmp_path / "c", workers=2)
    list(one.batches(0, 3))
    assert threading.main_thread() not in pictures
    assert {folder for folder, _ in kept} == {"latents", "text"}
    assert threading.main_thread() not in {thread for _, thread in kept}


def test_batches_come_before_the_one_that_fails(tmp_path: Path, base: Base) -> None:
    own = order(tmp_path)
    one, _ = feed(base, own, tmp_path / "c", cache_latents="off")
    file = own.batch(0)[0].picture.file
    bad = [n for n in range(40) if any(draw.picture.file == file for draw in own.batch(n))]
    start = next(n for n in range(40) if n not in bad and n + 1 not in bad and n + 2 in bad)
    file.unlink()
    batches = one.batches(start, start + 10)
    assert [next(batches).where[0][0] for _ in range(2)] == [start, start + 1]
    with pytest.raises(FormatError, match=file.name):
        next(batches)
