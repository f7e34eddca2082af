"""From pictures to batches: the same with and without caches, in one process or two, and nothing stale."""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from nerine.errors import FormatError, OptionError
from nerine.tiny import load_pipeline, style_set
from nerine.train.batch import Batch, Frame, Picture
from nerine.train.data.buckets import Buckets
from nerine.train.data.cache import Cache, Digests, fingerprint, key_of
from nerine.train.data.feed import Feed
from nerine.train.data.order import Order
from nerine.train.data.pictures import measure, read_picture
from nerine.train.families import Base, family_of
from nerine.train.randomness import Dice
from nerine.train.settings import DataSettings
from tiny_pipelines import PIPELINES


def noisy(file: Path, size: tuple[int, int], seed: int = 0, mode: str = "RGB", **more: Any) -> Path:
    channels = {"RGB": 3, "RGBA": 4, "L": 0, "P": 0}[mode]
    shape = (size[1], size[0], channels) if channels else (size[1], size[0])
    levels = numpy.random.default_rng(seed).integers(0, 256, shape, dtype=numpy.uint8)
    Image.fromarray(levels).save(file, **more)
    return file


def sd() -> Base:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return family_of(PIPELINES["sd"]())


def order(folder: Path, size: int = 4, count: int = 6, is_random: bool = False, **more: Any) -> Order:
    sizes = [(40, 24), (24, 40), (30, 30)]
    pictures = [
        Picture(noisy(folder / f"{n}.png", sizes[n % 3], n), f"caption {n % 2}", sizes[n % 3], **more)
        for n in range(count)
    ]
    return Order(pictures, Buckets(16, 8), size, Dice(3), is_random=is_random)


def feed(base: Base, own: Order, folder: Path, **data: Any) -> Feed:
    made = Feed(base, own, DataSettings(**data), folder)
    made.prepare()
    return made


def same(one: Batch, two: Batch) -> bool:
    pairs = [(one.latents.mean, two.latents.mean), (one.sizes, two.sizes), (one.weights, two.weights)]
    if one.latents.std is not None and two.latents.std is not None:
        pairs.append((one.latents.std, two.latents.std))
    if one.text is not None and two.text is not None:
        pairs += [(one.text[name], two.text[name]) for name in one.text]
    texts = (one.captions, one.where) == (two.captions, two.where)
    return texts and all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


# -- pictures ----------------------------------------------------------------------------------------------------------
def test_a_frame_is_cut_and_mirrored(tmp_path: Path) -> None:
    file = noisy(tmp_path / "a.png", (20, 12))
    levels = torch.from_numpy(numpy.array(Image.open(file))).permute(2, 0, 1).float() / 127.5 - 1
    frame = Frame((20, 12), (3, 2), (9, 7))
    assert torch.equal(read_picture(file, frame), levels[:, 2:9, 3:12])
    assert torch.equal(read_picture(file, frame, True), levels[:, 2:9, 3:12].flip(2))
    assert read_picture(file, Frame((10, 6), (0, 0), (10, 6))).shape == (3, 6, 10)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_other_modes_are_read(tmp_path: Path, mode: str) -> None:
    file = noisy(tmp_path / "a.png", (9, 5), mode=mode)
    found = read_picture(file, Frame((9, 5), (0, 0), (9, 5)))
    image = numpy.array(Image.open(file)).astype(float)
    expected = image[..., None].repeat(3, 2) if mode == "L" else None
    if mode == "RGBA":
        share = image[..., 3:] / 255
        expected = image[..., :3] * share + 255 * (1 - share)
    back = ((found + 1) * 127.5).permute(1, 2, 0).numpy()
    assert numpy.abs(back - expected).max() <= 1.5


def test_sixteen_bits_keep_their_range(tmp_path: Path) -> None:
    levels = numpy.array([[0, 65535], [32768, 16384]], dtype=numpy.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    found = read_picture(tmp_path / "a.png", Frame((2, 2), (0, 0), (2, 2)))
    assert torch.allclose(found[0], torch.tensor([[-1.0, 1.0], [0.0, -0.5]]), atol=0.02)


def test_orientation_is_respected(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = noisy(tmp_path / "a.png", (8, 4), exif=exif)
    assert measure(file) == (4, 8)
    turned = read_picture(file, Frame((4, 8), (0, 0), (4, 8)))
    plain = torch.from_numpy(numpy.array(Image.open(file))).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(turned, plain.rot90(-1, (1, 2)))


def test_a_picture_that_was_damaged_meanwhile_is_named(tmp_path: Path) -> None:
    file = noisy(tmp_path / "a.png", (40, 40))
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(FormatError, match=r"a\.png: the picture cannot be read"):
        read_picture(file, Frame((40, 40), (0, 0), (40, 40)))


# -- batches -----------------------------------------------------------------------------------------------------------
def test_caches_change_nothing(tmp_path: Path) -> None:
    base, own = sd(), order(tmp_path, flip=True)
    found = {
        way: feed(base, own, tmp_path / way, cache_latents=way, cache_text=way, workers=workers)
        for way, workers in (("disk", 2), ("memory", 0), ("off", 2))
    }
    assert found["disk"].caches_latents
    assert not found["off"].caches_latents
    batches = {way: list(one.batches(0, 7)) for way, one in found.items()}
    for way in ("disk", "memory"):
        assert all(same(a, b) for a, b in zip(batches["off"], batches[way], strict=True)), way
    first = batches["disk"][0]
    assert first.latents.std is not None
    assert first.latents.mean.shape[:2] == (4, 4)
    assert first.text is not None
    assert first.text["states"].shape[0] == 4


def test_what_is_kept_is_read_and_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, own = sd(), order(tmp_path)
    expected = list(feed(base, own, tmp_path / "c").batches(0, 3))

    def never(*_: Any) -> Any:
        raise AssertionError("encoded once more")

    monkeypatch.setattr(type(base), "encode_pictures", never)
    monkeypatch.setattr(type(base), "encode_text", never)
    again = list(feed(base, own, tmp_path / "c").batches(0, 3))
    assert all(same(a, b) for a, b in zip(expected, again, strict=True))


def test_a_changed_picture_or_encoder_is_encoded_anew(tmp_path: Path) -> None:
    base, own = sd(), order(tmp_path)
    before = feed(base, own, tmp_path / "c").batch(own.batch(0))
    for picture in own.pictures:
        noisy(picture.file, picture.size, 99)
    after = feed(base, own, tmp_path / "c").batch(own.batch(0))
    assert not torch.allclose(before.latents.mean, after.latents.mean)
    with torch.no_grad():
        next(base.text_encoders["text_encoder"].parameters()).mul_(2)
        assert base.vae is not None
        next(base.vae.parameters()).mul_(2)
    third = feed(base, own, tmp_path / "c").batch(own.batch(0))
    assert not torch.allclose(third.latents.mean, after.latents.mean)
    assert third.text is not None
    assert after.text is not None
    assert not torch.allclose(third.text["states"], after.text["states"])


def test_damaged_entries_are_made_anew(tmp_path: Path) -> None:
    base, own = sd(), order(tmp_path)
    expected = feed(base, own, tmp_path / "c").batch(own.batch(0))
    for file in (tmp_path / "c").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:9])
    assert same(expected, feed(base, own, tmp_path / "c").batch(own.batch(0)))


def test_two_processes_have_what_one_has(tmp_path: Path) -> None:
    base, own = sd(), order(tmp_path)
    one = feed(base, own, tmp_path / "c")
    whole = list(one.batches(0, 5))
    halves = [list(one.batches(0, 5, rank, 2)) for rank in (0, 1)]
    for n, batch in enumerate(whole):
        means = torch.cat([halves[0][n].latents.mean, halves[1][n].latents.mean])
        assert torch.equal(means, batch.latents.mean)
        assert halves[0][n].where + halves[1][n].where == batch.where


def test_sizes_and_weights_are_told(tmp_path: Path) -> None:
    base, own = sd(), order(tmp_path, weight=0.5)
    batch = feed(base, own, tmp_path / "c").batch(own.batch(0))
    for row, draw in zip(batch.sizes.tolist(), own.batch(0), strict=True):
        (width, height), (left, top), (w, h) = draw.picture.size, draw.frame.corner, draw.frame.size
        assert row == [height, width, top, left, h, w]
    assert batch.weights.tolist() == [0.5] * 4


def test_errors_come_at_their_batch_and_threads_end(tmp_path: Path) -> None:
    base, own = sd(), order(tmp_path)
    one = feed(base, own, tmp_path / "c", cache_latents="off")
    batches = one.batches(0, 50)
    next(batches)
    batches.close()  # abandoned
    assert not [t for t in threading.enumerate() if "ThreadPoolExecutor" in t.name]
    own.pictures[0].file.unlink()
    with pytest.raises(FormatError, match=r"0\.png"):
        list(one.batches(0, 5))


def test_what_changes_from_step_to_step_cannot_be_kept(tmp_path: Path) -> None:
    base = sd()
    with pytest.raises(OptionError, match="pictures are cut at random places"):
        feed(base, order(tmp_path, is_random=True), tmp_path / "c", cache_latents="disk")
    with pytest.raises(OptionError, match="tags are shuffled"):
        feed(base, order(tmp_path, shuffle_tags=True), tmp_path / "c", cache_text="memory")
    with pytest.raises(OptionError, match="text encoders are trained"):
        Feed(base, order(tmp_path), DataSettings(cache_text="disk"), tmp_path / "c", in_step=True)
    moving = feed(base, order(tmp_path, is_random=True, shuffle_tags=True), tmp_path / "c")
    assert not moving.caches_latents
    assert not moving.caches_text
    own = Feed(base, order(tmp_path), DataSettings(), tmp_path / "c", in_step=True)
    assert own.batch(own.order.batch(0)).text is None


def test_a_model_of_pixels_keeps_small_pictures_in_memory(tmp_path: Path) -> None:
    base = family_of(load_pipeline())
    data = style_set("neon")
    data.write(tmp_path / "p")
    pictures = [Picture(f, "a", (16, 16)) for f in sorted((tmp_path / "p").glob("*.png"))[:6]]
    own = Order(pictures, Buckets(16, 4), 3, Dice(0))
    one = feed(base, own, tmp_path / "c")
    assert not (tmp_path / "c" / "latents").exists()
    batch = one.batch(own.batch(0))
    numbers = [int(draw.picture.file.stem.split("-")[1]) for draw in own.batch(0)]
    assert torch.allclose(batch.latents.mean, data.train.pictures[numbers], atol=1e-6)
    assert batch.latents.std is None


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    one = Feed(sd(), order(tmp_path, caption_dropout=0.5), DataSettings(), tmp_path / "c")
    one.prepare(lambda *row: told.append(row))
    assert told[-1] == ("encoding captions", 3, 3)
    assert ("encoding pictures", 6, 6) in told


# -- caches ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", ["disk", "memory"])
def test_a_cache_keeps_what_it_is_given(tmp_path: Path, way: str) -> None:
    cache = Cache(tmp_path / "c" if way == "disk" else None)
    assert cache.get("ab12") is None
    assert "ab12" not in cache
    cache.put("ab12", {"x": torch.arange(6.0).reshape(2, 3).T, "y": torch.tensor([1], dtype=torch.bfloat16)})
    found = cache.get("ab12")
    assert found is not None
    assert "ab12" in cache
    assert torch.equal(found["x"], torch.arange(6.0).reshape(2, 3).T)
    assert found["y"].dtype == torch.bfloat16


def test_keys_and_fingerprints_tell_apart(tmp_path: Path) -> None:
    frame = Frame((8, 8), (0, 0), (8, 8))
    keys = {
        key_of("a", frame, False),
        key_of("a", frame, True),
        key_of("a", frame._replace(corner=(1, 0)), False),
        key_of("b", frame, False),
        key_of("a", "b"),
        key_of("ab"),
    }
    assert len(keys) == 6
    layer = torch.nn.Linear(300, 7)
    before = fingerprint(layer, "x")
    assert fingerprint(layer, "x") == before
    assert fingerprint(layer, "y") != before
    assert fingerprint(torch.nn.Linear(300, 7), "x") != before
    assert fingerprint(None, "x") != fingerprint(None, "y")
    file = tmp_path / "f"
    file.write_bytes(b"one")
    digests = Digests()
    first = digests.of(file)
    file.write_bytes(b"three")
    assert digests.of(file) != first
    assert replace(Picture(file, "c", (1, 1)), weight=2).weight == 2
