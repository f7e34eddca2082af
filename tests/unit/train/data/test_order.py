"""Buckets and the order of pictures: everyone as often as asked, batches of one size, the same for any processes."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nerine.errors import OptionError
from nerine.train.batch import Picture
from nerine.train.data.buckets import Buckets
from nerine.train.data.captions import caption_of, prefixed
from nerine.train.data.order import Order
from nerine.train.randomness import Dice

sides = st.integers(1, 4000)


def pictures(sizes: list[tuple[int, int]], repeats: int = 1, **more: object) -> list[Picture]:
    return [Picture(Path(f"{n}.png"), f"c{n}", size, repeats, **more) for n, size in enumerate(sizes)]  # type: ignore[arg-type]


@given(st.integers(1, 16), st.integers(1, 96), st.floats(1, 4), st.booleans(), st.booleans(), sides, sides)
def test_a_frame_fits(steps: int, step: int, aspect: float, many: bool, upscale: bool, width: int, height: int) -> None:
    buckets = Buckets(steps * step, step, many, aspect, upscale)
    scaled, corner, size = buckets.frame((width, height))
    assert all(side % step == 0 and side > 0 for side in size)
    assert size[0] * size[1] <= (steps * step) ** 2
    assert all(c >= 0 and c + s <= whole for c, s, whole in zip(corner, size, scaled, strict=True))
    assert scaled[0] == size[0] or scaled[1] == size[1] or max(scaled[0] - size[0], scaled[1] - size[1]) <= step
    if upscale:
        assert size in buckets.sizes()
    elif width >= step and height >= step:
        assert size[0] <= width
        assert size[1] <= height


def test_sizes_are_those_that_one_expects() -> None:
    sizes = Buckets(1024, 64).sizes()
    assert (1024, 1024) in sizes
    assert (832, 1216) in sizes
    assert (1216, 832) in sizes
    assert (896, 1152) in sizes
    assert max(w / h for w, h in sizes) <= 2
    assert Buckets(512, 64, many=False).sizes() == [(512, 512)]


def test_a_picture_goes_to_the_nearest_aspect() -> None:
    buckets = Buckets(512, 64)
    assert buckets.frame((1000, 1000)).size == (512, 512)
    assert buckets.frame((3000, 2000)).size == (576, 384) or buckets.frame((3000, 2000)).size == (640, 384)
    assert buckets.frame((100, 5000)).size[1] > 600
    assert buckets.frame((2000, 1000), (0.0, 0.0)).corner == (0, 0)


@given(st.integers(1, 16), st.integers(1, 96), st.floats(1, 4), st.booleans(), sides, sides)
def test_the_nearest_is_the_nearest_of_all(
    steps: int, step: int, aspect: float, many: bool, width: int, height: int
) -> None:
    buckets = Buckets(steps * step, step, many, aspect)
    wanted = math.log(width / height)
    best = min(buckets.sizes(), key=lambda b: (round(abs(math.log(b[0] / b[1]) - wanted), 9), -b[0] * b[1]))
    assert buckets.frame((width, height)).size == best


def test_finding_a_bucket_does_not_list_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    listed, sizes = [], Buckets.sizes

    def counted(self: Buckets) -> list[tuple[int, int]]:
        listed.append(self)
        return sizes(self)

    monkeypatch.setattr(Buckets, "sizes", counted)
    buckets = Buckets(1024, 8)
    for n in range(1, 200):
        buckets.frame((700 + n, 800))
    assert len(listed) <= 1


def test_small_pictures_are_not_enlarged() -> None:
    frame = Buckets(512, 64, upscale=False).frame((300, 200))
    assert frame.size[0] <= 300
    assert frame.size[1] <= 200


def test_a_resolution_below_the_step_is_refused() -> None:
    with pytest.raises(OptionError, match="resolution 32 is below 64"):
        Buckets(32, 64)


@given(
    st.lists(st.sampled_from([(512, 512), (300, 600), (900, 500), (64, 64)]), min_size=1, max_size=12),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_an_epoch_has_everyone_as_often_as_asked(
    sizes: list[tuple[int, int]], repeats: int, batch: int, epoch: int
) -> None:
    order = Order(pictures(sizes, repeats), Buckets(64, 16), batch, Dice(5))
    draws = [order.batch(n) for n in range(epoch * order.per_epoch, (epoch + 1) * order.per_epoch)]
    assert all(len(some) == batch for some in draws)
    assert all(len({draw.frame.size for draw in some}) == 1 for some in draws)
    seen = Counter(draw.picture.file for some in draws for draw in some)
    assert all(seen[Path(f"{n}.png")] >= repeats for n in range(len(sizes)))
    assert sum(seen.values()) == len(sizes) * repeats + order.filled
    assert order.filled < batch * len(order.counts())


def test_a_batch_is_a_function_of_its_number() -> None:
    make = lambda: Order(pictures([(64, 64)] * 30, flip=True), Buckets(64, 16), 4, Dice(9))  # noqa: E731
    one, two = make(), make()
    forward = [one.batch(n) for n in range(40)]
    backward = [two.batch(n) for n in reversed(range(40))]
    assert forward == backward[::-1]
    assert [draw.where for draw in forward[3]] == [(3, 0), (3, 1), (3, 2), (3, 3)]
    flips = [draw.flipped for some in forward for draw in some]
    assert 0.3 < sum(flips) / len(flips) < 0.7
    first = [d.picture.file for n in range(one.per_epoch) for d in forward[n]]
    second = [d.picture.file for n in range(one.per_epoch, 2 * one.per_epoch) for d in forward[n]]
    assert first != second


def test_random_crops_move() -> None:
    order = Order(pictures([(200, 100)] * 8), Buckets(32, 32, many=False), 4, Dice(0), is_random=True)
    corners = {draw.frame.corner for n in range(10) for draw in order.batch(n)}
    assert len(corners) > 10
    assert all(top == 0 and 0 <= left <= 32 for left, top in corners)


@pytest.mark.parametrize(("count", "repeats", "size"), [(0, 1, 4), (3, 0, 4), (3, 1, 0)])
def test_nothing_to_order_is_refused(count: int, repeats: int, size: int) -> None:
    words = f"got {count} pictures, {count * repeats} with their repeats, in batches of {size}"
    with pytest.raises(OptionError, match=words):
        Order(pictures([(64, 64)] * count, repeats), Buckets(64, 16), size, Dice(0))


def test_a_picture_that_is_never_repeated_does_not_come() -> None:
    some = [*pictures([(64, 64)] * 3), Picture(Path("never.png"), "c", (64, 64), 0)]
    order = Order(some, Buckets(64, 16), 2, Dice(0))
    seen = {draw.picture.file.name for n in range(3 * order.per_epoch) for draw in order.batch(n)}
    assert seen == {"0.png", "1.png", "2.png"}


def test_a_hundred_thousand_pictures_are_no_burden() -> None:
    sizes = [(512 + n % 7 * 64, 512) for n in range(100_000)]
    order = Order(pictures(sizes), Buckets(512, 64), 8, Dice(0))
    order.batch(0)
    began = time.perf_counter()
    for n in range(100):
        order.batch(n)
    assert (time.perf_counter() - began) / 100 < 0.01


# -- captions ----------------------------------------------------------------------------------------------------------
def test_captions_are_dropped_in_their_share() -> None:
    picture = Picture(Path("1.png"), "a, b", (8, 8), caption_dropout=0.25)
    found = [caption_of(picture, Dice(1), (n, 0)) for n in range(2000)]
    assert set(found) == {"a, b", ""}
    assert found.count("") / 2000 == pytest.approx(0.25, abs=0.03)


def test_tags_are_shuffled_after_those_that_stay() -> None:
    picture = Picture(Path("1.png"), "x, y , a,b, c", (8, 8), shuffle_tags=True, keep_tokens=2)
    found = {caption_of(picture, Dice(1), (n, 0)) for n in range(200)}
    assert len(found) == 6
    assert all(caption.startswith("x, y, ") for caption in found)
    assert all(sorted(caption.split(", ")) == ["a", "b", "c", "x", "y"] for caption in found)


@pytest.mark.parametrize("prefix", ["sks, dog, ", "sks", "x, a"])
def test_a_prefix_stays_in_front_of_shuffled_tags(prefix: str) -> None:
    caption = prefixed(prefix, "a, b, c")
    own = Picture(Path("1.png"), caption, (8, 8), shuffle_tags=True, prefix=prefix)
    found = {caption_of(own, Dice(1), (n, 0)) for n in range(200)}
    assert len(found) == 6
    assert all(one.startswith(prefixed(prefix, "x")[:-1]) for one in found)
    kept = {caption_of(replace(own, keep_tokens=1), Dice(1), (n, 0)) for n in range(200)}
    assert kept == {prefixed(prefix, "a, b, c"), prefixed(prefix, "a, c, b")}
    alone = Picture(Path("1.png"), prefix, (8, 8), shuffle_tags=True, prefix=prefix)
    assert caption_of(alone, Dice(1), (0, 0)) == prefix
