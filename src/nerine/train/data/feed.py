"""The feed: draws in, batches out. Pictures and captions are read, encoded, and kept where they can be.

Latents are kept as the VAE's distribution, from which each step draws anew, as it would without a cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from nerine.errors import OptionError
from nerine.train.batch import Batch, Draw, Frame, Latents, Picture
from nerine.train.data.cache import Cache, Digests, fingerprint, key_of
from nerine.train.data.order import Order
from nerine.train.data.pictures import read_picture
from nerine.train.families.base import Base
from nerine.train.settings import DataSettings

__all__ = ["Feed", "Prepared"]

Progress = Callable[[str, int, int], None]  # what, done, total
Variant = tuple[Path, Frame, bool]  # file, frame, mirrored
T = TypeVar("T")
R = TypeVar("R")
FORM = "1"  # of what is kept; another number when pictures are read or cut in another way
AT_ONCE = 8  # pictures and captions that are encoded together, at most
PIXELS_AT_ONCE = AT_ONCE * 512**2  # of the pictures that are encoded together; one of them may have more
AHEAD = 2  # batches that are read in advance
SMALL = 512 * 2**20  # bytes of pictures that are kept in memory for models that work on pixels
_SCALES = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # of a VAE's configuration


class Prepared(NamedTuple):
    """What `Feed.prepare` did in this process: pictures and captions that it encoded, and that there were already."""

    pictures: int = 0
    pictures_kept: int = 0
    captions: int = 0
    captions_kept: int = 0


class Feed:
    """Batches of `order` for `base`. With `in_step` captions are left to the step, which trains their encoders.

    Raises:
        OptionError: something is to be kept that changes from step to step.
    """

    def __init__(self, base: Base, order: Order, settings: DataSettings, folder: Path, in_step: bool = False) -> None:
        self.base = base
        self.order = order
        self.workers = settings.workers
        self.in_step = in_step
        self._latents = self._cache(self._latents_way(settings), folder / "latents")
        is_on_disk = self._latents is not None and self._latents.folder is not None
        self._digests = Digests(folder / "digests.json" if is_on_disk else None)
        self._texts = self._cache(self._texts_way(settings), folder / "text")
        self._vae_mark = fingerprint(base.vae, "latents", FORM, base.family, *_scales(base.vae))
        encoders = nn.ModuleDict(dict(base.text_encoders))
        self._text_mark = fingerprint(encoders, "text", FORM, base.family, *_tokenizers(base.pipeline))

    @property
    def caches_latents(self) -> bool:
        """Whether the VAE has nothing more to do once all is prepared."""
        return self._latents is not None or self.base.vae is None

    @property
    def caches_text(self) -> bool:
        """Whether the text encoders have nothing more to do."""
        return self._texts is not None and not self.in_step

    @property
    def damaged(self) -> int:
        """Kept entries that could not be read, and were made anew."""
        return sum(cache.damaged for cache in (self._latents, self._texts) if cache is not None)

    # -- which caches --------------------------------------------------------------------------------------------------
    def _latents_way(self, settings: DataSettings) -> str:
        way = settings.cache_latents
        if self.order.is_random:
            if way in ("disk", "memory"):
                raise OptionError(
                    f'cache_latents = "{way}": pictures are cut at random places (crop = "random"), so that no two '
                    "steps have the same; take the one or the other"
                )
            return "off"
        if way != "auto":
            return way
        if self.base.vae is not None:
            return "disk"
        pixels = sum(w * h for p in range(len(self.order.pictures)) for w, h in [self.order.frame(p).size])
        return "memory" if pixels * 12 * 2 <= SMALL else "off"  # three channels in fp32, and perhaps mirrored

    def _texts_way(self, settings: DataSettings) -> str:
        way, pictures = settings.cache_text, self.order.pictures
        changing = "text encoders are trained" if self.in_step else ""
        if any(p.shuffle_tags for p in pictures):
            changing = changing or "tags are shuffled"
        if changing and way in ("disk", "memory"):
            raise OptionError(
                f'cache_text = "{way}": {changing}, so that encoded captions change; take "off" or "auto"'
            )
        return "off" if changing else ("disk" if way == "auto" else way)

    @staticmethod
    def _cache(way: str, folder: Path) -> Cache | None:
        return None if way == "off" else Cache(folder if way == "disk" else None)

    # -- beforehand ----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def prepare(self, progress: Progress | None = None, rank: int = 0, world: int = 1) -> Prepared:
        """Encode what is to be kept and is not there yet; several processes share the work on a disk.

        Raises:
            FormatError: a picture cannot be read any more.
        """
        tell = progress or (lambda what, done, total: None)
        pictures, captions = (0, 0), (0, 0)
        if self._latents is not None:
            wanted = list(dict.fromkeys(self._variants()))
            missing = {one for one in wanted if self._picture_key(*one) not in self._latents}
            if rank == 0:
                self._digests.save()
            own = [one for one in _share(wanted, self._latents, rank, world) if one in missing]
            self._encode_pictures(own, tell)
            pictures = (len(own), len(wanted) - len(missing))
        if self._texts is not None:
            texts = list(dict.fromkeys(self._captions()))
            lacking = {caption for caption in texts if self._text_key(caption) not in self._texts}
            told = [caption for caption in _share(texts, self._texts, rank, world) if caption in lacking]
            self._encode_captions(told, tell)
            captions = (len(told), len(texts) - len(lacking))
        return Prepared(*pictures, *captions)

    def _variants(self) -> Iterator[Variant]:
        for number, picture in enumerate(self.order.pictures):
            yield picture.file, self.order.frame(number), False
            if picture.flip:
                yield picture.file, self.order.frame(number), True

    def _captions(self) -> Iterator[str]:
        yield from (picture.caption for picture in self.order.pictures)
        if any(picture.caption_dropout for picture in self.order.pictures):
            yield ""

    def _encode_pictures(self, wanted: Sequence[Variant], tell: Progress) -> None:
        assert self._latents is not None
        done = 0
        for some, pixels in _in_advance(_read_variant, _of_one_size(wanted), self.workers):
            found = self._encoded(torch.stack(pixels))
            for i, one in enumerate(some):
                self._latents.put(self._picture_key(*one), _row(found, i))
            done += len(some)
            tell("encoding pictures", done, len(wanted))

    def _encode_captions(self, wanted: Sequence[str], tell: Progress) -> None:
        assert self._texts is not None
        for start in range(0, len(wanted), AT_ONCE):
            some = wanted[start : start + AT_ONCE]
            found = self.base.encode_text(some)
            for i, caption in enumerate(some):
                self._texts.put(self._text_key(caption), {name: t[i] for name, t in found.items()})
            tell("encoding captions", start + len(some), len(wanted))

    # -- batches -------------------------------------------------------------------------------------------------------
    def batches(self, start: int, stop: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The micro-batches `start` ... `stop - 1` of a run, of each the share of this process; `order.size` is a
        multiple of `world`.

        Raises:
            FormatError: a picture cannot be read any more; raised where its batch would come.
        """
        share = self.order.size // world
        draws = (self.order.batch(number)[rank * share : (rank + 1) * share] for number in range(start, stop))
        is_in_memory = self._latents is not None and self._latents.folder is None
        for wanted, read in _in_advance(self._read, map(self._wanted, draws), 0 if is_in_memory else self.workers):
            yield self._assembled(wanted, read)

    def batch(self, draws: Sequence[Draw]) -> Batch:
        """What the model is given for these draws."""
        wanted = self._wanted(draws)
        return self._assembled(wanted, [self._read(one) for one in wanted])

    def _wanted(self, draws: Sequence[Draw]) -> list[Draw | str]:
        """What is read for a batch: its pictures, and each of its captions once if captions are kept."""
        captions = dict.fromkeys(draw.caption for draw in draws) if self.caches_text else {}
        return [*draws, *captions]

    def _read(self, one: Draw | str) -> Mapping[str, Tensor]:
        """What is kept of a picture or a caption; else its pixels, or nothing."""
        if isinstance(one, str):
            return (self._texts.get(self._text_key(one)) if self._texts is not None else None) or {}
        if self._latents is not None:
            found = self._latents.get(self._picture_key(one.picture.file, one.frame, one.flipped))
            if found is not None:
                return found
        return {"pixels": read_picture(one.picture.file, one.frame, one.flipped)}

    def _assembled(self, wanted: Sequence[Draw | str], found: Sequence[Mapping[str, Tensor]]) -> Batch:
        draws = [one for one in wanted if isinstance(one, Draw)]
        kept = {one: tensors for one, tensors in zip(wanted, found, strict=True) if isinstance(one, str)}
        read = [self._made(draw, one) if "pixels" in one else one for draw, one in zip(draws, found, strict=False)]
        latents = Latents(
            torch.stack([one["mean"] for one in read]),
            torch.stack([one["std"] for one in read]) if "std" in read[0] else None,
        )
        captions = tuple(draw.caption for draw in draws)
        return Batch(
            latents=latents,
            text=None if self.in_step else self._text(captions, kept),
            captions=captions,
            sizes=torch.tensor([_sizes(draw.picture, draw.frame) for draw in draws]),
            weights=torch.tensor([draw.picture.weight for draw in draws]),
            where=tuple(draw.where for draw in draws),
        )

    def _made(self, draw: Draw, read: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Latents of pixels, kept where they should have been."""
        row = _row(self._encoded(read["pixels"][None]), 0)
        if self._latents is not None:
            self._latents.put(self._picture_key(draw.picture.file, draw.frame, draw.flipped), row)
        return row

    @torch.no_grad()
    def _encoded(self, pixels: Tensor) -> Latents:
        vae = self.base.vae
        if vae is not None:
            first = next(vae.parameters())
            pixels = pixels.to(first.device, first.dtype)
        mean, std = self.base.encode_pictures(pixels)
        return Latents(mean.float().cpu(), None if std is None else std.float().cpu())

    def _text(self, captions: Sequence[str], kept: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        found = {caption: kept.get(caption) or self._told(caption) for caption in dict.fromkeys(captions)}
        first = found[captions[0]]
        return {name: torch.stack([found[caption][name] for caption in captions]) for name in first}

    @torch.no_grad()
    def _told(self, caption: str) -> Mapping[str, Tensor]:
        """An encoded caption, kept where it should have been."""
        told = {name: t[0].cpu() for name, t in self.base.encode_text([caption]).items()}
        if self._texts is not None:
            self._texts.put(self._text_key(caption), told)
        return told

    # -- names ---------------------------------------------------------------------------------------------------------
    def _picture_key(self, file: Path, frame: Frame, flipped: bool) -> str:
        return key_of(self._digests.of(file), frame, flipped, self._vae_mark)

    def _text_key(self, caption: str) -> str:
        return key_of(caption, self._text_mark)


def _in_advance(
    read: Callable[[T], R], groups: Iterable[Sequence[T]], workers: int
) -> Iterator[tuple[Sequence[T], list[R]]]:
    """Each group with what `read` makes of its members, in threads that are a few groups ahead. What goes wrong is
    raised where its group would come; the threads end with the iterator."""
    if workers == 0:
        yield from ((group, [read(one) for one in group]) for group in groups)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[Sequence[T], list[Future[R]]]] = deque()
        rest = iter(groups)
        try:
            while True:
                for group in islice(rest, AHEAD + 1 - len(waiting)):
                    waiting.append((group, [pool.submit(read, one) for one in group]))
                if not waiting:
                    return
                group, futures = waiting.popleft()
                yield group, [future.result() for future in futures]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _of_one_size(wanted: Sequence[Variant]) -> Iterator[list[Variant]]:
    """Groups to be encoded together: of one size, and not too many pixels."""
    by_size: dict[tuple[int, int], list[Variant]] = {}
    for one in wanted:
        by_size.setdefault(one[1].size, []).append(one)
    for (width, height), members in by_size.items():
        count = max(1, min(AT_ONCE, PIXELS_AT_ONCE // (width * height)))
        yield from (members[start : start + count] for start in range(0, len(members), count))


def _read_variant(one: Variant) -> Tensor:
    return read_picture(*one)


def _scales(vae: Any) -> list[str]:
    """What else the latents of a VAE depend on."""
    config = getattr(vae, "config", None) or {}
    return [f"{name}={config.get(name)!r}" for name in _SCALES]


def _tokenizers(pipeline: Any) -> list[str]:
    """What else encoded captions depend on."""
    found = [getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
    return [f"{type(one).__name__} {len(one)} {one.model_max_length}" for one in found if one is not None]


def _share(wanted: list[T], cache: Cache, rank: int, world: int) -> list[T]:
    """What this process sees to: all of it where each keeps its own. The others may be ahead, so that shares are of
    what is wanted, which all agree on, and not of what is missing yet."""
    return wanted if cache.folder is None else wanted[rank::world]


def _row(latents: Latents, i: int) -> dict[str, Tensor]:
    found = {"mean": latents.mean[i].clone()}
    if latents.std is not None:
        found["std"] = latents.std[i].clone()
    return found


def _sizes(picture: Picture, frame: Frame) -> tuple[int, ...]:
    """Original height and width, top and left of the window, its height and width."""
    (width, height), (left, top), (w, h) = picture.size, frame.corner, frame.size
    return height, width, top, left, h, w
