"""Each family against the pipeline itself: what the trainer encodes and asks is what the pipeline encodes and asks."""

from __future__ import annotations

import inspect
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
from tiny_pipelines import PIPELINES, t5, tokenizer, vae

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
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(),
        vae=vae(),
        transformer=transformer,
        scheduler=diffusers.DDIMScheduler(),
    )


def pixart_alpha() -> Any:
    """One that is told of sizes, as those for 1024 pixels are."""
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=128,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=6,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=48,
        out_channels=8,
    ).eval()
    assert transformer.use_additional_conditions
    return diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(),
        vae=vae(),
        transformer=transformer,
        scheduler=diffusers.DDIMScheduler(),
    )


def gemma(layers: int) -> Any:
    """The text encoder of Sana and Lumina 2."""
    config = transformers.Gemma2Config(
        hidden_size=8,
        head_dim=4,
        intermediate_size=12,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=layers,
        vocab_size=29,
        attn_implementation="eager",
    )
    return transformers.Gemma2Model(config).eval()


def sana() -> Any:
    """Its autoencoder gives no distribution, its times are scaled, and its prompts have an instruction before them."""
    torch.manual_seed(0)
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
        timestep_scale=0.5,
    ).eval()
    blocks: dict[str, Any] = {
        f"{side}_{what}": value
        for side in ("encoder", "decoder")
        for what, value in {
            "block_types": ("ResBlock", "EfficientViTBlock"),
            "block_out_channels": (8, 8),
            "qkv_multiscales": ((), (5,)),
            "layers_per_block": (1, 1),
        }.items()
    }
    return diffusers.SanaPipeline(
        tokenizer=tokenizer(),
        text_encoder=gemma(layers=1),
        vae=diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=2, scaling_factor=0.4, **blocks).eval(),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def aura() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        out_channels=4,
        pos_embed_max_size=1024,
    ).eval()
    words = tokenizer()
    words.model_input_names = ["input_ids", "attention_mask"]
    return diffusers.AuraFlowPipeline(
        tokenizer=words,
        text_encoder=t5(),
        vae=vae(),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def lumina() -> Any:
    """Its time runs from the noise to the picture, and its prompts have an instruction before them."""
    torch.manual_seed(0)
    deep = diffusers.AutoencoderKL(  # the pipeline counts on eight pixels to a latent
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        use_quant_conv=False,
    ).eval()
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=8,
        norm_eps=1e-5,
        scaling_factor=1.0,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(512, 32, 32),
        cap_feat_dim=8,
    ).eval()
    return diffusers.Lumina2Pipeline(
        tokenizer=tokenizer(),
        text_encoder=gemma(layers=2),
        vae=deep,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


MORE = {"pixart": pixart, "pixart-alpha": pixart_alpha, "sana": sana, "aura": aura, "lumina": lumina}
FLOWS = {
    "TinyPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "SanaPipeline",
    "AuraFlowPipeline",
    "Lumina2Pipeline",
}


def size_of(base: Base) -> tuple[int, int]:
    """(width, height): no square, in what the pipeline takes."""
    return (64, 32) if type(base.pipeline).__name__ in ("SanaPipeline", "Lumina2Pipeline") else (WIDTH, HEIGHT)


def made(kind: str) -> Any:
    with warnings.catch_warnings():  # of the configurations of the little schedulers
        warnings.simplefilter("ignore", FutureWarning)
        return _made(kind)


def _made(kind: str) -> Any:
    pipe = load_pipeline() if kind == "tiny" else {**PIPELINES, **MORE}[kind]()
    pipe.set_progress_bar_config(disable=True)
    if kind in ("sd3", "flux", "lumina"):
        pipe.vae.register_to_config(shift_factor=0.1, scaling_factor=0.7)
    return pipe


KINDS = ["tiny", *PIPELINES, *MORE]


@pytest.fixture(params=KINDS)
def base(request: pytest.FixtureRequest) -> Base:
    return family_of(made(request.param))


def steps_of(base: Base, text: Any, noise: Tensor) -> Tensor:
    """A denoising run made of what the family gives: without guidance, in the scheduler's own steps."""
    scheduler = base.pipeline.scheduler
    if base.family == "tiny":
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / STEPS, STEPS).tolist())
    elif type(base.pipeline).__name__ in ("FluxPipeline", "Lumina2Pipeline"):
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
    width, height = size_of(base)
    return torch.randn(2, 4, height // base.scale, width // base.scale)  # type: ignore[attr-defined]


@torch.no_grad()
def test_a_run_of_its_own_is_the_pipelines_run(base: Base) -> None:
    prompts = ["a cat", "two dogs"]
    noise = noise_for(base)
    found = steps_of(base, base.encode_text(prompts), noise.clone())
    asked: dict[str, Any] = {"guidance_scale": 1.0, "num_inference_steps": STEPS, "output_type": "latent"}
    width, height = size_of(base)
    if base.vae is not None:
        asked |= {"width": width, "height": height}
    known = inspect.signature(base.pipeline.__call__).parameters
    asked |= {name: False for name in ("use_resolution_binning", "clean_caption") if name in known}
    latents = noise
    if base.family == "flux":
        asked["max_sequence_length"] = 512
        latents = base.pipeline._pack_latents(noise, 2, 4, *noise.shape[2:])
    expected = base.pipeline(prompts, latents=latents.clone(), **asked).images
    if base.family == "flux":
        expected = base.pipeline._unpack_latents(expected, height, width, base.scale)  # type: ignore[attr-defined]
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
    width, height = size_of(base)
    pictures = torch.rand(2, 3, height, width) * 2 - 1
    mean, std = base.encode_pictures(pictures)
    if base.vae is None:
        assert torch.equal(mean, pictures)
        assert std is None
        return
    vae_: Any = base.vae
    if type(vae_).__name__ == "AutoencoderDC":
        assert torch.allclose(mean / vae_.config.scaling_factor, vae_.encode(pictures).latent, atol=1e-6)
        assert std is None
        return
    own = vae_.encode(pictures).latent_dist
    back = mean / vae_.config.scaling_factor + (vae_.config.shift_factor or 0.0)
    assert torch.allclose(back, own.mean, atol=1e-6)
    assert std is not None
    assert torch.allclose(std / vae_.config.scaling_factor, own.std, rtol=1e-5)


def test_sizes_and_predictions_are_known(base: Base) -> None:
    assert base.resolution % base.step == 0
    assert base.prediction == ("flow" if type(base.pipeline).__name__ in FLOWS else "epsilon")
    assert base.denoiser is getattr(base.pipeline, base.component)


def test_v_is_read_from_the_scheduler() -> None:
    pipe = made("sd")
    pipe.scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")
    assert family_of(pipe).prediction == "v"
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    assert family_of(pipe).prediction == "flow"
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
    size = (16, 16) if base.family == "tiny" else size_of(base)
    drawn = base.draw(["a cat", "a dog"], steps=2, size=size, seeds=[1, 2])
    again = base.draw(["a dog"], steps=2, size=size, seeds=[2])
    assert [p.size for p in drawn] == [size, size]
    assert again[0].tobytes() == drawn[1].tobytes() or _near(again[0], drawn[1])
    with pytest.raises(OptionError, match="seeds: expected one for each of 3 prompts"):
        base.draw(["a", "b", "c"], steps=1, seeds=[1, 2])


def test_drawing_is_at_rest_and_training_goes_on() -> None:
    """T5 has dropouts: drawn twice while it is trained, a picture is the same; and each part is then as it was."""
    base = family_of(made("sd3"))
    base.text_encoders["text_encoder_3"].train()
    base.denoiser.transformer_blocks[1].train()  # type: ignore[index, union-attr]
    parts = (base.denoiser, base.vae, *base.text_encoders.values())
    before = [module.training for part in parts for module in part.modules()]  # type: ignore[union-attr]
    assert len(set(before)) == 2
    asked: dict[str, Any] = {"steps": 2, "size": (WIDTH, HEIGHT), "guidance": 1.0}
    assert base.draw(["a cat"], **asked)[0].tobytes() == base.draw(["a cat"], **asked)[0].tobytes()
    assert [module.training for part in parts for module in part.modules()] == before  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True])
def test_what_is_no_seed_is_refused(seed: Any) -> None:
    with pytest.raises(OptionError, match="seed: expected a whole number from 0 to 18446744073709551615, got"):
        family_of(made("tiny")).draw(["a"], steps=1, seeds=[seed])


def _near(one: Any, two: Any) -> bool:
    import numpy

    return int(numpy.abs(numpy.asarray(one, dtype=int) - numpy.asarray(two, dtype=int)).max()) <= 1


def test_a_negative_prompt_where_there_is_none_is_refused() -> None:
    with pytest.raises(OptionError, match="TinyPipeline takes no negative prompt"):
        family_of(made("tiny")).draw(["a"], negative="b", steps=1)


def test_a_negative_prompt_that_would_be_ignored_is_refused() -> None:
    """Flux takes the argument, and heeds it only with a guidance that needs a second call."""
    with pytest.raises(OptionError, match=r"negative: FluxPipeline .* distilled"):
        family_of(made("flux")).draw(["a"], negative="b", steps=1, size=(WIDTH, HEIGHT))


def test_pictures_are_encoded_without_gradients(base: Base) -> None:
    width, height = size_of(base)
    mean, std = base.encode_pictures(torch.zeros(1, 3, height, width))
    assert not mean.requires_grad
    assert std is None or not std.requires_grad


@pytest.mark.parametrize("kind", [*PIPELINES, *MORE])
def test_pictures_are_decoded_in_the_format_of_the_vae(kind: str) -> None:
    """The VAE stays in fp32 beside a denoiser in fp16, and pictures are about what they are in fp32."""
    base = family_of(made(kind))
    asked: dict[str, Any] = {"steps": 2, "size": size_of(base), "guidance": 1.0}
    exact = base.draw(["a cat"], **asked)[0]
    for part in (base.denoiser, *base.text_encoders.values()):
        part.to(torch.float16)
    assert _far(base.draw(["a cat"], **asked)[0], exact) < 24
    assert "decode" not in vars(base.vae)


def test_autocast_does_not_reach_the_vae() -> None:
    base = family_of(made("sdxl"))
    formats = []
    base.vae.decoder.conv_in.register_forward_hook(lambda m, given, found: formats.append(found.dtype))  # type: ignore[union-attr]
    base.denoiser.conv_in.register_forward_hook(lambda m, given, found: formats.append(found.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        base.draw(["a cat"], steps=1, size=(WIDTH, HEIGHT))
    assert formats == [torch.bfloat16, torch.float32]


def _far(one: Any, two: Any) -> float:
    import numpy

    return float(numpy.abs(numpy.asarray(one, dtype=int) - numpy.asarray(two, dtype=int)).max())


def test_sizes_that_cannot_be_drawn_are_named() -> None:
    base = family_of(made("flux"))
    base.check_size(16, 8)
    with pytest.raises(OptionError, match=r"size: .* multiples of 2 pixels, got 15x8; the nearest is 16x8"):
        base.check_size(15, 8)
    family_of(load_pipeline()).check_size(17, 16)


def test_an_argument_of_which_nothing_is_known_is_named() -> None:
    pipe = made("pixart")

    class Asking(type(pipe.transformer)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, mood: Tensor, timestep: Tensor) -> None: ...

    pipe.transformer.__class__ = Asking
    with pytest.raises(UnsupportedBase, match="PixArtSigmaPipeline: its transformer wants 'mood'"):
        family_of(pipe)


def test_an_unknown_pipeline_is_refused() -> None:
    class StableDiffusionPipelineX:
        pass

    with pytest.raises(UnsupportedBase, match="StableDiffusionPipelineX: it is not known how"):
        family_of(StableDiffusionPipelineX())


def test_every_class_is_in_one_family() -> None:
    names = [name for family in FAMILIES for name in family.classes]
    assert len(names) == len(set(names))
