"""Language models of transformers: generating with adapters, and the Trainer's checkpoints with adapters alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nerine
from nerine import BOFT, DoRA, LoHa, LoKr, LoRA, MergeError, Network, OptionError

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'nerine[train]'")
pytest.importorskip("accelerate", reason="needs accelerate: pip install 'nerine[train]'")
safetensors_torch = pytest.importorskip("safetensors.torch")

from nerine.integrations.transformers import SaveAdapters  # noqa: E402

pytestmark = [
    pytest.mark.no_device_guard,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.utils.data"),
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    names = ("transformers", "accelerate")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


SIZES = {"vocab_size": 40, "eos_token_id": None, "bos_token_id": 0, "pad_token_id": 0}
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **SMALL))


def qwen2() -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, **SMALL))


def gpt2() -> Any:
    config = transformers.GPT2Config(**SIZES, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def t5() -> Any:
    config = transformers.T5Config(
        **SIZES, d_model=16, d_kv=6, d_ff=20, num_heads=2, num_layers=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


MODELS = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2, "t5": t5}
TARGETS = {"gpt2": ["attn", "mlp"], "t5": ["SelfAttention", "EncDecAttention", "DenseReluDense"]}


def made(name: str, gain: float = 3) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():  # larger than they start, so that one word is not as good as another
        for p in model.parameters():
            p.mul_(gain)
    return model


def adapted(model: Any, name: str = "llama", algorithm: Any = LoRA(rank=3, alpha=2)) -> Network:  # noqa: B008
    generator = torch.Generator().manual_seed(1)
    network = nerine.attach(model, algorithm, targets=TARGETS.get(name, ["self_attn", "mlp"]), generator=generator)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return network.eval()


PROMPT = torch.tensor([[3, 14, 15, 9, 2], [6, 5, 35, 8, 9]])


def said(model: Any, **more: Any) -> Tensor:
    mask = torch.ones_like(PROMPT)
    found: Tensor = model.generate(PROMPT, attention_mask=mask, max_new_tokens=8, do_sample=False, **more)
    return found


@pytest.mark.parametrize(
    "algorithm", [LoRA(rank=3, alpha=2), DoRA(LoKr(rank=2, factor=2)), BOFT(block_size=4)], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_generating_with_and_without_the_cache(name: str, algorithm: Any) -> None:
    model = made(name)
    base = said(model)
    network = adapted(model, name, algorithm)
    want = said(model, use_cache=False)
    assert not torch.equal(want, base)
    assert torch.equal(said(model, use_cache=True), want)
    assert torch.equal(said(model, num_beams=2), said(model, num_beams=2, use_cache=False))
    network.merge()
    assert torch.equal(said(model), want)
    network.unmerge()
    with network.paused():
        assert torch.equal(said(model), base)
    network.detach()
    assert torch.equal(said(model), base)


@pytest.mark.parametrize("algorithm", [LoRA(rank=3, alpha=2), DoRA(LoHa(rank=2))], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_generating_in_bf16(name: str, algorithm: Any) -> None:
    """It follows fp32 about as closely as the base in bf16 follows its own."""

    def scores(model: Any) -> Tensor:
        with torch.no_grad():
            inputs = {"decoder_input_ids": PROMPT.flip(1)} if name == "t5" else {}
            found: Tensor = model(PROMPT, **inputs).logits
        return found.float()

    def apart(one: Any, other: Any) -> float:
        return float((scores(one) - scores(other)).norm() / scores(other).norm())

    whole, half = made(name, 1), made(name, 1).to(torch.bfloat16)
    base, plain = apart(half, whole), scores(whole)
    assert base > 0
    for model in (whole, half):
        network = adapted(model, name, algorithm)
        with torch.no_grad():
            for p in network.parameters():
                p.mul_(0.5 if p.dim() > 1 else 1)
        assert all(p.dtype == torch.float32 for p in network.parameters())
    assert float((scores(whole) - plain).norm() / plain.norm()) > 4 * base
    assert apart(half, whole) < 3 * base + 0.005
    out = said(half, output_scores=True, return_dict_in_generate=True)
    assert out.sequences.shape[1] == (9 if name == "t5" else 13)
    assert all(score.isfinite().all() for score in out.scores)


# -- the Trainer -------------------------------------------------------------------------------------------------------
class Words(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = (torch.arange(8) * 3 + i * 5) % 40
        return {"input_ids": ids, "labels": ids}


class StopAt(transformers.TrainerCallback):
    """As if the machine had gone down after that step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


def trainer(
    folder: Path, *callbacks: Any, saving: bool = True, prepare: Any = None, **settings: Any
) -> tuple[Any, Network]:
    torch.manual_seed(0)
    model = llama()
    torch.manual_seed(3)
    algorithm = DoRA(LoKr(rank=2, factor=4))
    network = nerine.attach(model, algorithm, targets=["q_proj", "up_proj"], dropout=0.1, rank_dropout=0.1)
    if prepare is not None:
        prepare(model)
    args = transformers.TrainingArguments(
        str(folder),
        max_steps=6,
        save_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        learning_rate=1e-2,
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **settings,
    )
    own = [SaveAdapters(network)] if saving else []
    made = transformers.Trainer(model, args, train_dataset=Words(), eval_dataset=Words(), callbacks=[*own, *callbacks])
    made.remove_callback(transformers.PrinterCallback)
    return made, network


def test_checkpoints_hold_adapters_and_resume_bit_for_bit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, want = trainer(tmp_path / "whole")
    whole.train()
    before, _ = trainer(tmp_path / "parts", StopAt(4))
    before.train()
    checkpoint = tmp_path / "parts" / "checkpoint-4"
    kept = safetensors_torch.load_file(checkpoint / "model.safetensors")
    assert kept
    assert all(".nerine." in key for key in kept)
    assert not (checkpoint / "config.json").exists()
    assert sum(t.numel() for t in kept.values()) == sum(p.numel() for p in want.parameters())

    after, got = trainer(tmp_path / "parts")
    with caplog.at_level(logging.WARNING, logger="transformers"):
        after.train(resume_from_checkpoint=True)
    assert not [r for r in caplog.records if "missing keys" in r.getMessage()]
    assert after.state.global_step == 6
    assert got.state_dict().keys() == want.state_dict().keys()
    assert all(torch.equal(t, want.state_dict()[key]) for key, t in got.state_dict().items())
    ours, theirs = (t.optimizer.state_dict()["state"] for t in (after, whole))
    assert all(torch.equal(ours[i]["exp_avg_sq"], theirs[i]["exp_avg_sq"]) for i in theirs)
    losses = [
        json.loads((tmp_path / d / "checkpoint-6" / "trainer_state.json").read_text()) for d in ("whole", "parts")
    ]
    assert losses[0]["global_step"] == losses[1]["global_step"]

    torch.manual_seed(0)
    fresh = llama().eval()
    nerine.load(fresh, tmp_path / "parts" / "checkpoint-6" / "adapters.safetensors", strict=True)
    x = Words()[3]["input_ids"][None]
    torch.testing.assert_close(fresh(x).logits, after.model.eval()(x).logits, rtol=1e-5, atol=1e-6)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    """The worst by loss, here, which is the first."""
    own, network = trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    own.train()
    assert own.state.best_model_checkpoint.endswith("checkpoint-2")
    kept = safetensors_torch.load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    last = safetensors_torch.load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    state = own.model.state_dict()
    assert all(torch.equal(state[key], t) for key, t in kept.items())
    assert any(not torch.equal(last[key], t) for key, t in kept.items())
    assert own.evaluate()["eval_loss"] == pytest.approx(own.state.best_metric, abs=1e-6)
    assert len(network)


def test_whatever_else_is_trained_is_saved_too(tmp_path: Path) -> None:
    own, _ = trainer(tmp_path, StopAt(2), prepare=lambda model: model.lm_head.requires_grad_(True))
    own.train()
    kept = safetensors_torch.load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert "lm_head.weight" in kept
    assert torch.equal(kept["lm_head.weight"], own.model.lm_head.weight)
    again, _ = trainer(tmp_path, prepare=lambda model: model.lm_head.requires_grad_(True))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6


def test_without_the_callback_checkpoints_hold_all_and_resume(tmp_path: Path) -> None:
    whole, want = trainer(tmp_path / "whole", saving=False)
    whole.train()
    before, _ = trainer(tmp_path / "parts", StopAt(4), saving=False)
    before.train()
    kept = safetensors_torch.load_file(tmp_path / "parts" / "checkpoint-4" / "model.safetensors")
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.nerine.default.magnitude"} <= kept.keys()
    after, got = trainer(tmp_path / "parts", saving=False)
    after.train(resume_from_checkpoint=True)
    assert all(torch.equal(t, want.state_dict()[key]) for key, t in got.state_dict().items())


def test_a_model_saves_itself_again_once_merged(tmp_path: Path) -> None:
    own, network = trainer(tmp_path, StopAt(2))
    own.train()
    own.model.eval()
    x = Words()[3]["input_ids"][None]
    with torch.no_grad():
        want = own.model(x).logits
    own.save_model(str(tmp_path / "adapters"))
    assert {f.name for f in (tmp_path / "adapters").iterdir()} >= {"model.safetensors", "adapters.safetensors"}
    network.merge()
    own.save_model(str(tmp_path / "merged"))
    network.unmerge()
    network.merge(keep_original=False)
    network.detach()
    own.model.save_pretrained(tmp_path / "final")
    for folder in ("merged", "final"):
        back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / folder).eval()
        assert not any("nerine" in key for key in safetensors_torch.load_file(tmp_path / folder / "model.safetensors"))
        torch.testing.assert_close(back(x).logits, want, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_saved_so_is_told_at_once(tmp_path: Path) -> None:
    model = llama()
    network = nerine.attach(model, LoRA(rank=2), targets="q_proj")
    args = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(OptionError, match=r"no parameters of the LlamaForCausalLM that the Trainer trains"):
        transformers.Trainer(llama(), args, callbacks=[SaveAdapters(network)])
    hosted = llama()
    with pytest.raises(OptionError, match="own=True"):
        transformers.Trainer(
            hosted, args, callbacks=[SaveAdapters(nerine.attach(hosted, LoRA(), targets="q_proj", own=False))]
        )
    network.requires_grad_(False)
    with pytest.raises(OptionError, match=r"network\.requires_grad_\(\)"):
        transformers.Trainer(model, args, callbacks=[SaveAdapters(network)])
    network.requires_grad_()
    nerine.attach(model, LoRA(rank=1), targets="q_proj", name="second")
    with pytest.raises(OptionError, match=r"hand over one of default, second"):
        SaveAdapters(Network.of(model))
    with pytest.raises(OptionError, match="the peft dialect is a folder"):
        SaveAdapters(network, dialect="peft")
    with pytest.raises(OptionError, match=r"expected a nerine\.Network, got LlamaForCausalLM"):
        SaveAdapters(model)
    with pytest.raises(MergeError, match=r"save_pretrained: it has adapters .*\(default, second\)"):
        model.save_pretrained(tmp_path / "model")
    callback = SaveAdapters(network)
    transformers.Trainer(model, args, callbacks=[callback])
    callback.remove()
    with pytest.raises(MergeError, match=r"save_pretrained: it has adapters"):
        model.save_pretrained(tmp_path / "model")
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        callback.fit  # noqa: B018
