"""The tiny model as it ships: loads in silence, offline, reads any text, and draws what it is asked for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from nerine.errors import MissingExtra, OptionError
from nerine.tiny import Judge, load_pipeline, prompt
from nerine.tiny.load import MODEL

if TYPE_CHECKING:
    from nerine.tiny.pipeline import TinyPipeline

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


# diffusers imports torchao and bitsandbytes where they are installed, which report what they lack for this torch and
# this processor
OF_OTHERS = re.compile("torchao|_pytree.*(KernelPreference|ScaleCalculationMode)|kernels-community")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe() -> TinyPipeline:
    return load_pipeline()


def test_the_parts_are_real_ones_in_full_precision_and_eval_mode(pipe: TinyPipeline) -> None:
    assert type(pipe.unet).__name__ == "UNet2DConditionModel"
    assert type(pipe.text_encoder).__name__ == "CLIPTextModel"
    for module in (pipe.unet, pipe.text_encoder):
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
        assert not module.training


def test_another_dtype_can_be_asked_for() -> None:
    pipe = load_pipeline(torch.bfloat16)
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.bfloat16


def test_loading_and_sampling_print_nothing_and_warn_of_nothing() -> None:
    code = "from nerine.tiny import load_pipeline; load_pipeline()('a handwritten one', 2)"
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    ours = [line for line in result.stderr.splitlines() if not OF_OTHERS.search(line)]
    assert (result.stdout, ours) == ("", [])


def test_the_folder_is_small_and_says_how_it_was_trained() -> None:
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) < 8_000_000
    report = json.loads((MODEL / "training.json").read_text(encoding="utf-8"))
    assert report["accuracy_base"] >= 0.95


def test_every_known_word_is_one_token(pipe: TinyPipeline) -> None:
    for text in ("a handwritten seven, neon", "the digit three, drawn by hand", "white on black paper"):
        assert len(pipe.tokenizer.tokenize(text)) == len(text.replace(",", " ,").split())


@pytest.mark.parametrize("text", ["a handwritten seven, neon", "zürich 七 \U0001f642", "qwxz-jvk", "€ ~^`|"])
def test_every_text_survives_the_tokenizer(pipe: TinyPipeline, text: str) -> None:
    ids = pipe.tokenizer(text).input_ids
    assert pipe.tokenizer.unk_token_id not in ids[1:-1]
    decoded = pipe.tokenizer.decode(ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == text.replace(" ", "")


def test_every_byte_has_a_token(pipe: TinyPipeline) -> None:
    from tokenizers import pre_tokenizers

    vocabulary = pipe.tokenizer.get_vocab()
    for letter in pre_tokenizers.ByteLevel.alphabet():
        assert letter in vocabulary
        assert f"{letter}</w>" in vocabulary


def test_long_prompts_are_cut(pipe: TinyPipeline) -> None:
    states = pipe.encode(["", "a handwritten seven " * 20])
    assert states.shape == (2, pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim)


def test_a_seed_fixes_the_picture(pipe: TinyPipeline) -> None:
    def draw(seed: int) -> torch.Tensor:
        pictures: torch.Tensor = pipe(
            ["a handwritten seven"], num_inference_steps=3, generator=seeded(seed), output_type="pt"
        ).images
        return pictures

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_given_noise_is_used(pipe: TinyPipeline) -> None:
    noise = torch.randn(1, 3, 16, 16, generator=seeded(5))
    given = pipe("a handwritten two", 2, latents=noise, output_type="pt").images
    drawn = pipe("a handwritten two", 2, generator=seeded(5), output_type="pt").images
    assert torch.equal(given, drawn)


def test_output_types(pipe: TinyPipeline) -> None:
    def draw(kind: str) -> object:
        return pipe(["a handwritten two"] * 2, 2, generator=seeded(), output_type=kind, return_dict=False)[0]

    pictures, raw = draw("pt"), draw("latent")
    assert isinstance(pictures, torch.Tensor)
    assert pictures.shape == (2, 3, 16, 16)
    torch.testing.assert_close(raw, pictures * 2 - 1)
    images = draw("pil")
    assert isinstance(images, list)
    assert [image.size for image in images] == [(16, 16)] * 2


@pytest.mark.parametrize(("arguments", "words"), [({"output_type": "np"}, "'np'"), ({"prompt": []}, "empty")])
def test_wrong_arguments_are_refused(pipe: TinyPipeline, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        pipe(**({"prompt": "one"} | arguments))


def test_the_model_draws_what_it_is_asked_for(pipe: TinyPipeline) -> None:
    digits = torch.arange(10).repeat(2)
    pictures = pipe(
        [prompt(digit) for digit in digits.tolist()],
        num_inference_steps=10,
        generator=seeded(),
        output_type="latent",
    ).images
    assert Judge().accuracy(pictures, digits) >= 0.9


def test_a_style_that_it_has_never_seen_leaves_the_digit_plain(pipe: TinyPipeline) -> None:
    digits = torch.arange(10)
    pictures = pipe(
        [prompt(digit, "neon") for digit in digits.tolist()],
        num_inference_steps=10,
        generator=seeded(),
        output_type="latent",
    ).images
    assert Judge().accuracy(pictures, digits) >= 0.8
    assert (pictures.amax(1) - pictures.amin(1)).mean() < 0.1  # grey: no colour apart from another


def test_the_usual_way_of_loading_works_too(pipe: TinyPipeline) -> None:
    from nerine.tiny.pipeline import TinyPipeline

    other = TinyPipeline.from_pretrained(MODEL, local_files_only=True)
    for name in ("unet", "text_encoder"):
        ours, theirs = getattr(pipe, name).state_dict(), getattr(other, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key].float()) for key in ours)


@pytest.mark.parametrize("missing", ["diffusers", "transformers"])
def test_a_missing_package_is_answered_with_the_extra(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "nerine.tiny.pipeline", raising=False)
    with pytest.raises(MissingExtra, match=r'pip install "nerine\[train\]"'):
        load_pipeline()
