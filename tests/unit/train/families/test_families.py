"""Each family against the pipeline itself: what the trainer encodes and asks is what the pipeline encodes and asks."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import Tensor

from nerine.errors import OptionError, UnsupportedBase
from nerine.tiny import load_pipeline
from nerine.train.families import FAMILIES, Base, family_of
from tiny_pipelines import LENGTH, PIPELINES, tokenizer, vae

WIDTH, HEIGHT = 16, 8  # pixels, and no square
STEPS = 3


def pixart() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        use_additional_conditions=False,
    ).eval()
    torch.manual_seed(3)
    config = transformers.T5Config(
        d_model=16, d_kv=6, d_ff=20, num_heads=2, num_layers=2, vocab_size=29, feed_forward_proj="gated-gelu"
    )
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer(),
        text_encoder=transformers.T5EncoderModel(config).eval(),
        vae=vae(),
        transformer=transformer,
        scheduler=diffusers.DDIMScheduler(),
    )


def made(kind: str) -> Any:
    with warnings.catch_warnings():  # of the configurations of the little schedulers
        warnings.simplefilter("ignore", FutureWarning)
        return _made(kind)


def _made(kind: str) -> Any:
    pipe = load_pipeline() if kind == "tiny" else pixart() if kind == "pixart" else PIPELINES[kind]()
    pipe.set_progress_bar_config(disable=True)
    if kind in ("sd3", "flux"):
        pipe.vae.register_to_config(shift_factor=0.1, scaling_factor=0.7)
    return pipe


KINDS = ["tiny", *PIPELINES, "pixart"]


@pytest.fixture(params=KINDS)
def base(request: pytest.FixtureRequest) -> Base:
    return family_of(made(request.param))


def steps_of(base: Base, text: Any, noise: Tensor) -> Tensor:
    """A denoising run made of what the family gives: without guidance, in the scheduler's own steps."""
    scheduler = base.pipeline.scheduler
    if base.family == "tiny":
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / STEPS, STEPS).tolist())
    elif base.family == "flux":
        import numpy

        scheduler.set_timesteps(sigmas=numpy.linspace(1.0, 1 / STEPS, STEPS))
    else:
        scheduler.set_timesteps(STEPS)
    height, width = (side * (1 if base.vae is None else base.scale) for side in noise.shape[2:])  # type: ignore[attr-defined]
    sizes = torch.tensor([[height, width, 0, 0, height, width]]).expand(len(noise), -1)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for time in scheduler.timesteps:
        x = scheduler.step(base.predict(x, time.expand(len(x)), text, sizes), time, x, return_dict=False)[0]
    return x


def noise_for(base: Base) -> Tensor:
    torch.manual_seed(5)
    if base.vae is None:
        return torch.randn(2, 3, 16, 16)
    channels = {"flux": 4}.get(base.family, 4)
    return torch.randn(2, channels, HEIGHT // base.scale, WIDTH // base.scale)  # type: ignore[attr-defined]


@torch.no_grad()
def test_a_run_of_its_own_is_the_pipelines_run(base: Base) -> None:
    prompts = ["a cat", "two dogs"]
    noise = noise_for(base)
    found = steps_of(base, base.encode_text(prompts), noise.clone())
    asked: dict[str, Any] = {"guidance_scale": 1.0, "num_inference_steps": STEPS, "output_type": "latent"}
    if base.vae is not None:
        asked |= {"width": WIDTH, "height": HEIGHT}
    if base.family == "transformer":
        asked |= {"use_resolution_binning": False, "clean_caption": False}
    latents = noise
    if base.family == "flux":
        asked["max_sequence_length"] = 512
        latents = base.pipeline._pack_latents(noise, 2, 4, *noise.shape[2:])
    expected = base.pipeline(prompts, latents=latents.clone(), **asked).images
    if base.family == "flux":
        expected = base.pipeline._unpack_latents(expected, HEIGHT, WIDTH, base.scale)  # type: ignore[attr-defined]
    if base.family == "tiny":
        found = found.clamp(-1, 1)
    assert expected.shape == found.shape
    assert float((found - expected).abs().max()) < 1e-5
    assert float((found - noise).abs().max()) > 0.01


def test_texts_stack_row_by_row(base: Base) -> None:
    """What captions give together is what each gives alone, so that they can be kept one by one."""
    captions = ["a cat", "", "a very long caption of many letters"]
    with torch.no_grad():
        together = base.encode_text(captions)
        for i, caption in enumerate(captions):
            alone = base.encode_text([caption])
            assert alone.keys() == together.keys()
            for name, t in alone.items():
                assert torch.allclose(t[0].float(), together[name][i].float(), atol=1e-5), name


def test_text_encoders_get_gradients(base: Base) -> None:
    for encoder in base.text_encoders.values():
        encoder.requires_grad_(True)
    sum(t.float().square().sum() for t in base.encode_text(["a cat"]).values() if t.is_floating_point()).backward()  # type: ignore[union-attr]
    for name, encoder in base.text_encoders.items():
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in encoder.parameters()), name


@torch.no_grad()
def test_latents_are_what_the_pipeline_decodes(base: Base) -> None:
    """The mean, brought back as the pipeline does, is the mean that the VAE gave."""
    pictures = torch.rand(2, 3, HEIGHT, WIDTH) * 2 - 1
    mean, std = base.encode_pictures(pictures)
    if base.vae is None:
        assert torch.equal(mean, pictures)
        assert std is None
        return
    vae_: Any = base.vae
    own = vae_.encode(pictures).latent_dist
    back = mean / vae_.config.scaling_factor + (vae_.config.shift_factor or 0.0)
    assert torch.allclose(back, own.mean, atol=1e-6)
    assert std is not None
    assert torch.allclose(std / vae_.config.scaling_factor, own.std, rtol=1e-5)


def test_sizes_and_predictions_are_known(base: Base) -> None:
    assert base.resolution % base.step == 0
    assert base.prediction == {"tiny": "flow", "sd3": "flow", "flux": "flow"}.get(base.family, "epsilon")
    assert base.denoiser is getattr(base.pipeline, base.component)


def test_v_is_read_from_the_scheduler() -> None:
    pipe = made("sd")
    pipe.scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")
    assert family_of(pipe).prediction == "v"
    pipe.scheduler = diffusers.DDIMScheduler(prediction_type="sample")
    with pytest.raises(UnsupportedBase, match="'sample'"):
        _ = family_of(pipe).prediction


def test_a_guided_flux_is_told_of_no_guidance() -> None:
    pipe = made("flux")
    torch.manual_seed(0)
    config = dict(pipe.transformer.config) | {"guidance_embeds": True}
    pipe.transformer = diffusers.FluxTransformer2DModel.from_config(config).eval()
    base = family_of(pipe)
    noise = noise_for(base)
    with torch.no_grad():
        found = base.predict(noise, torch.tensor([500.0, 700.0]), base.encode_text(["a", "b"]), torch.zeros(2, 6))
    assert found.shape == noise.shape


def test_pictures_are_drawn_from_their_seeds(base: Base) -> None:
    size = (16, 16) if base.family == "tiny" else (WIDTH, HEIGHT)
    drawn = base.draw(["a cat", "a dog"], steps=2, size=size, seeds=[1, 2])
    again = base.draw(["a dog"], steps=2, size=size, seeds=[2])
    assert [p.size for p in drawn] == [size, size]
    assert again[0].tobytes() == drawn[1].tobytes() or _near(again[0], drawn[1])
    with pytest.raises(OptionError, match="seeds: expected one for each of 3 prompts"):
        base.draw(["a", "b", "c"], steps=1, seeds=[1, 2])


def _near(one: Any, two: Any) -> bool:
    import numpy

    return int(numpy.abs(numpy.asarray(one, dtype=int) - numpy.asarray(two, dtype=int)).max()) <= 1


def test_a_negative_prompt_where_there_is_none_is_refused() -> None:
    with pytest.raises(OptionError, match="TinyPipeline takes no negative prompt"):
        family_of(made("tiny")).draw(["a"], negative="b", steps=1)


def test_an_unknown_pipeline_is_refused() -> None:
    class StableDiffusionPipelineX:
        pass

    with pytest.raises(UnsupportedBase, match="StableDiffusionPipelineX: it is not known how"):
        family_of(StableDiffusionPipelineX())


def test_every_class_is_in_one_family() -> None:
    names = [name for family in FAMILIES for name in family.classes]
    assert len(names) == len(set(names))
    assert LENGTH  # the pipelines above cut captions there
