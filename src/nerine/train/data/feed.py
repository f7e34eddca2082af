"""The feed: draws in, batches out. Pictures and captions are read, encoded, and kept where they can be.

Latents are kept as the VAE's distribution, from which each step draws anew, as it would without a cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from nerine.errors import OptionError
from nerine.train.batch import Batch, Draw, Frame, Latents, Picture
from nerine.train.data.cache import Cache, Digests, fingerprint, key_of
from nerine.train.data.order import Order
from nerine.train.data.pictures import read_picture
from nerine.train.families.base import Base
from nerine.train.settings import DataSettings

__all__ = ["Feed"]

Progress = Callable[[str, int, int], None]  # what, done, total
T = TypeVar("T")
AT_ONCE = 8  # pictures and captions that are encoded together
AHEAD = 2  # batches that are read in advance
SMALL = 512 * 2**20  # bytes of pictures that are kept in memory for models that work on pixels


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
        self._digests = Digests()
        self._latents = self._cache(self._latents_way(settings), folder / "latents")
        self._texts = self._cache(self._texts_way(settings), folder / "text")
        self._vae_mark = fingerprint(base.vae, "latents", base.family)
        encoders = nn.ModuleDict(dict(base.text_encoders))
        self._text_mark = fingerprint(encoders, "text", base.family)

    @property
    def caches_latents(self) -> bool:
        """Whether the VAE has nothing more to do once all is prepared."""
        return self._latents is not None or self.base.vae is None

    @property
    def caches_text(self) -> bool:
        """Whether the text encoders have nothing more to do."""
        return self._texts is not None and not self.in_step

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
    def prepare(self, progress: Progress | None = None, rank: int = 0, world: int = 1) -> None:
        """Encode what is to be kept and is not there yet; several processes share the work on a disk."""
        tell = progress or (lambda what, done, total: None)
        if self._latents is not None:
            wanted = list(dict.fromkeys(self._variants()))
            missing = [one for one in wanted if self._picture_key(*one) not in self._latents]
            self._encode_pictures(_share(missing, self._latents, rank, world), tell)
        if self._texts is not None:
            captions = dict.fromkeys(p.caption for p in self.order.pictures)
            if any(p.caption_dropout for p in self.order.pictures):
                captions[""] = None
            lacking = [caption for caption in captions if self._text_key(caption) not in self._texts]
            self._encode_captions(_share(lacking, self._texts, rank, world), tell)

    def _variants(self) -> Iterator[tuple[Path, Frame, bool]]:
        for number, picture in enumerate(self.order.pictures):
            yield picture.file, self.order.frame(number), False
            if picture.flip:
                yield picture.file, self.order.frame(number), True

    def _encode_pictures(self, wanted: Sequence[tuple[Path, Frame, bool]], tell: Progress) -> None:
        assert self._latents is not None
        by_size: dict[tuple[int, int], list[tuple[Path, Frame, bool]]] = {}
        for one in wanted:
            by_size.setdefault(one[1].size, []).append(one)
        done = 0
        for members in by_size.values():
            for start in range(0, len(members), AT_ONCE):
                some = members[start : start + AT_ONCE]
                found = self._encoded(torch.stack([read_picture(*one) for one in some]))
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
        multiple of `world`."""
        share = self.order.size // world
        draws = (self.order.batch(number)[rank * share : (rank + 1) * share] for number in range(start, stop))
        if self.workers == 0 or (self._latents is not None and self._latents.folder is None):
            yield from map(self.batch, draws)
            return
        with ThreadPoolExecutor(self.workers) as pool:
            waiting: deque[tuple[list[Draw], list[Future[Mapping[str, Tensor]]]]] = deque()
            try:
                for some in draws:
                    waiting.append((some, [pool.submit(self._read, draw) for draw in some]))
                    if len(waiting) > AHEAD:
                        yield self._collected(*waiting.popleft())
                while waiting:
                    yield self._collected(*waiting.popleft())
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def batch(self, draws: Sequence[Draw]) -> Batch:
        """What the model is given for these draws."""
        return self._assembled(draws, [self._read(draw) for draw in draws])

    def _collected(self, draws: Sequence[Draw], futures: Sequence[Future[Mapping[str, Tensor]]]) -> Batch:
        return self._assembled(draws, [future.result() for future in futures])

    def _read(self, draw: Draw) -> Mapping[str, Tensor]:
        """Latents from the cache, else pixels; of pixels that are kept, both are the same."""
        if self._latents is not None:
            key = self._picture_key(draw.picture.file, draw.frame, draw.flipped)
            found = self._latents.get(key)
            if found is not None:
                return found
        return {"pixels": read_picture(draw.picture.file, draw.frame, draw.flipped)}

    def _assembled(self, draws: Sequence[Draw], read: Sequence[Mapping[str, Tensor]]) -> Batch:
        if any("pixels" in one for one in read):
            read = [self._made(draw, one) if "pixels" in one else one for draw, one in zip(draws, read, strict=True)]
        latents = Latents(
            torch.stack([one["mean"] for one in read]),
            torch.stack([one["std"] for one in read]) if "std" in read[0] else None,
        )
        captions = tuple(draw.caption for draw in draws)
        return Batch(
            latents=latents,
            text=None if self.in_step else self._text(captions),
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

    def _text(self, captions: Sequence[str]) -> Mapping[str, Tensor]:
        found: dict[str, Mapping[str, Tensor]] = {}
        for caption in dict.fromkeys(captions):
            kept = self._texts.get(self._text_key(caption)) if self._texts is not None else None
            if kept is None:
                with torch.no_grad():
                    kept = {name: t[0].cpu() for name, t in self.base.encode_text([caption]).items()}
                if self._texts is not None:
                    self._texts.put(self._text_key(caption), kept)
            found[caption] = kept
        first = found[captions[0]]
        return {name: torch.stack([found[caption][name] for caption in captions]) for name in first}

    # -- names ---------------------------------------------------------------------------------------------------------
    def _picture_key(self, file: Path, frame: Frame, flipped: bool) -> str:
        return key_of(self._digests.of(file), frame, flipped, self._vae_mark)

    def _text_key(self, caption: str) -> str:
        return key_of(caption, self._text_mark)


def _share(wanted: list[T], cache: Cache, rank: int, world: int) -> list[T]:
    """What this process encodes: all of it where each keeps its own."""
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
