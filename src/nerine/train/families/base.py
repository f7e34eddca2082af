"""Base: a loaded diffusion model as the trainer sees it, whatever its family.

A family says how captions and pictures are encoded, how its denoiser is called, and how a picture is drawn. It knows
nothing of adapters, data or optimisers.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nerine.errors import OptionError
from nerine.train.batch import Latents, Text

__all__ = ["Base", "check_seed", "seeds_for"]

SEEDS = 2**64  # so many there are for the generators of torch


class Base(ABC):
    """A pipeline with its denoiser; one subclass a family.

    `prediction` is what the denoiser was trained to predict ("epsilon", "v" or "flow"), `scheduler` the pipeline's own
    (its configuration has the noise schedule), `resolution` the side of the pictures that it was trained on and `step`
    what sides must be multiples of, in pixels.
    """

    family: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]  # names of the pipelines that are of this family
    lr: ClassVar[float] = 1e-4  # a learning rate for adapters that suits it
    guidance: ClassVar[float] = 5.0  # a guidance scale that suits it

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @property
    def denoiser(self) -> nn.Module:
        found: nn.Module = getattr(self.pipeline, "transformer", None) or self.pipeline.unet
        return found

    @property
    def component(self) -> str:
        """What the pipeline calls its denoiser."""
        return "transformer" if getattr(self.pipeline, "transformer", None) is not None else "unet"

    @property
    def vae(self) -> nn.Module | None:
        found: nn.Module | None = getattr(self.pipeline, "vae", None)
        return found

    @property
    def text_encoders(self) -> Mapping[str, nn.Module]:
        """Those that there are, by the names of the pipeline."""
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        found = {name: getattr(self.pipeline, name, None) for name in names}
        return {name: part for name, part in found.items() if part is not None}

    @property
    def encoders(self) -> list[nn.Module]:
        """What encodes pictures and captions."""
        return [part for part in (self.vae, *self.text_encoders.values()) if part is not None]

    @property
    def parts(self) -> list[nn.Module]:
        """All modules of the base."""
        return [self.denoiser, *self.encoders]

    @property
    @abstractmethod
    def prediction(self) -> str: ...

    @property
    @abstractmethod
    def resolution(self) -> int: ...

    @property
    @abstractmethod
    def step(self) -> int: ...

    @property
    def grain(self) -> int:
        """What the sides of drawn pictures must be multiples of, in pixels."""
        return 1

    def check_size(self, width: int, height: int) -> None:
        """Whether a picture of this size can be drawn.

        Raises:
            OptionError: it cannot.
        """
        grain = self.grain
        if width % grain or height % grain:
            near = "x".join(str(max(grain, (side + grain // 2) // grain * grain)) for side in (width, height))
            raise OptionError(
                f"size: {type(self.pipeline).__name__} draws sides that are multiples of {grain} pixels, got "
                f"{width}x{height}; the nearest is {near}"
            )

    @abstractmethod
    def encode_text(self, captions: Sequence[str]) -> Text:
        """What the denoiser is told of the captions, on the text encoders' device; with gradients where they are on."""

    @abstractmethod
    def encode_pictures(self, pictures: Tensor) -> Latents:
        """Latents of pictures `[batch, 3, height, width]` in [-1, 1], without gradients."""

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, sizes: Tensor) -> Tensor:
        """The denoiser's prediction for noisy latents, of their shape. `timesteps` [batch] are in [0, 1000], growing
        with the noise (whole numbers except for flow); `sizes` as in Batch."""

    def draw(
        self,
        prompts: Sequence[str],
        *,
        negative: str = "",
        steps: int = 20,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
        seeds: Sequence[int] = (0,),
    ) -> list[Any]:
        """One PIL picture for each prompt, by the pipeline's own call; `seeds` has one number for each, or one for all,
        `size` is (width, height). The noise is drawn on the CPU, so that a seed means the same noise everywhere.

        Raises:
            OptionError: the pipeline takes no negative prompt, the seeds are not as many as the prompts, or are none.
        """
        known = inspect.signature(self.pipeline.__call__).parameters
        if negative and "negative_prompt" not in known:
            raise OptionError(f"negative: {type(self.pipeline).__name__} takes no negative prompt")
        width, height = size or (self.resolution, self.resolution)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds_for(prompts, seeds)]
        asked = {
            "prompt": list(prompts),
            "num_inference_steps": steps,
            "guidance_scale": self.guidance if guidance is None else guidance,
            "output_type": "pil",
            **({"negative_prompt": [negative] * len(prompts)} if negative else {}),
            **({"width": width, "height": height} if "width" in known else {}),
            # captions and sizes as they are in training, and not as some pipelines would improve them
            **{name: False for name in ("clean_caption", "use_resolution_binning") if name in known},
        }
        shown = dict(getattr(self.pipeline, "_progress_bar_config", {}))
        self.pipeline.set_progress_bar_config(disable=True)
        try:
            with torch.no_grad(), _resting(self):
                return list(self.call(asked, generators, (width, height)).images)
        finally:
            self.pipeline.set_progress_bar_config(**shown)

    def call(self, asked: dict[str, Any], generators: list[torch.Generator], size: tuple[int, int]) -> Any:
        """The pipeline's call for pictures of `size`; a family *may* have its own."""
        return self.pipeline(**asked, generator=generators)


@contextmanager
def _resting(base: Base) -> Iterator[None]:
    """No dropout of the base's own is on for the length of a `with` block, whatever training has switched on."""
    awake = [module for part in base.parts for module in part.modules() if module.training]
    for module in awake:
        module.training = False
    try:
        yield
    finally:
        for module in awake:
            module.training = True


def check_seed(seed: object) -> None:
    """Raises OptionError where it is no number that noise can be drawn from."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEEDS:
        raise OptionError(f"seed: expected a whole number from 0 to {SEEDS - 1}, got {seed!r}")


def seeds_for(prompts: Sequence[str], seeds: Sequence[int]) -> list[int]:
    """One seed for each prompt.

    Raises:
        OptionError: there are neither as many nor one, or one of them is no seed.
    """
    for seed in seeds:
        check_seed(seed)
    if len(seeds) == 1:
        return list(seeds) * len(prompts)
    if len(seeds) != len(prompts):
        raise OptionError(f"seeds: expected one for each of {len(prompts)} prompts, or one for all, got {len(seeds)}")
    return list(seeds)
