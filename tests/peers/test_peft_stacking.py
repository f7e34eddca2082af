"""nerine and PEFT on the same layers: the output has both deviations, and files know nothing of the other program."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nerine
from nerine import BOFT, DoRA, LoHa, LoKr, LoRA, MergeError, Network
from peers.stirred import stir

peft = pytest.importorskip("peft", reason="needs peft: pip install 'nerine[peers]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'nerine[train]'")
safetensors_torch = pytest.importorskip("safetensors.torch")

pytestmark = [
    pytest.mark.peers,
    pytest.mark.no_device_guard,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Already"),
]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(9, 12)
        self.block = nn.ModuleDict({"lin": nn.Linear(12, 20), "conv": nn.Conv1d(20, 14, 3, padding=1)})
        self.head = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block["lin"](self.words(x)).tanh()
        out: Tensor = self.head(self.block["conv"](x.mT).mT.tanh())
        return out


X = torch.arange(14).reshape(2, 7) % 9
CONFIGS = {
    "LoRA": lambda **more: peft.LoraConfig(r=3, lora_alpha=2, target_modules=["lin", "conv"], **more),
    "LoHa": lambda **more: peft.LoHaConfig(r=2, alpha=3, target_modules=["lin", "conv"], **more),
    "LoKr": lambda **more: peft.LoKrConfig(r=2, alpha=3, target_modules=["lin"], **more),
}


def wrapped(model: nn.Module, kind: str = "LoRA", **more: Any) -> Any:
    torch.manual_seed(3)
    found = peft.get_peft_model(model, CONFIGS[kind](**more)).eval()
    stir((p for name, p in found.named_parameters() if any(w in name for w in ("lora_", "hada_", "lokr_"))), seed=1)
    return found


def file_of(folder: Path, algorithm: Any = LoRA(rank=2, alpha=3)) -> Path:  # noqa: B008
    torch.manual_seed(4)
    network = nerine.attach(Model(), algorithm)
    stir(network.parameters())
    nerine.save(network, folder / "own.safetensors")
    return folder / "own.safetensors"


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "algorithm", [LoRA(rank=2, alpha=3), DoRA(LoKr(rank=1, factor=2)), BOFT(block_size=2)], ids=str
)
@torch.no_grad()
def test_both_deviations_are_added(kind: str, algorithm: Any, tmp_path: Path) -> None:
    """y = W'x + PEFT's own delta: as where nerine's adapter is in the weight for good, and PEFT comes on top."""
    file = file_of(tmp_path, algorithm)
    model = wrapped(Model(), kind)
    alone = model(X)
    network = nerine.load(model, file, strict=True)
    assert [path for path, *_ in network.adapters()] == ["block.lin", "block.conv", "head"]
    below = Model()
    once = nerine.load(below, file)
    once.merge(keep_original=False)
    once.detach()
    want = wrapped(below, kind)(X)
    close(model(X), want)
    assert not torch.allclose(want, alone, atol=1e-2)
    with model.disable_adapter():
        plain = Model()
        nerine.load(plain, file)
        close(model(X), plain.eval()(X))
    network.off()
    assert torch.equal(model(X), alone)
    network.on()

    nerine.save(network, tmp_path / "again.safetensors")
    first, second = (safetensors_torch.load_file(f) for f in (file, tmp_path / "again.safetensors"))
    assert first.keys() == second.keys()
    assert all(torch.equal(t, second[key]) for key, t in first.items())
    network.detach()
    assert torch.equal(model(X), alone)
    assert not any("nerine" in key for key in model.state_dict())


@torch.no_grad()
def test_its_own_layers_are_no_targets() -> None:
    model = wrapped(Model(), modules_to_save=["head"])
    planned = nerine.plan(model, LoRA(rank=2))
    assert [row.layer for row in planned.rows] == ["block.lin", "block.conv", "head"]
    network = nerine.attach(model, LoRA(rank=2), targets=["block", "words"])
    assert [path for path, *_ in network.adapters()] == ["words", "block.lin", "block.conv"][-len(network) :]
    assert all(not name.startswith("lora_") for name, _ in network.named_parameters())
    with pytest.raises(nerine.TargetError, match="no layer of PeftModel matches 'lora_A'"):
        nerine.attach(model, LoRA(rank=2), targets="lora_A", name="other")


@torch.no_grad()
def test_the_copy_that_is_trained_is_the_one_that_is_adapted() -> None:
    model = wrapped(Model(), modules_to_save=["head"])
    before = model(X)
    network = nerine.attach(model, LoRA(rank=2), targets="head")
    stir(network.parameters())
    assert not torch.allclose(model(X), before, atol=1e-2)
    assert [path for path, *_ in network.adapters()] == ["head"]
    assert "_nerine_mounts" in model.base_model.model.head.modules_to_save["default"].__dict__


@pytest.mark.parametrize("first", ["nerine", "peft"])
@torch.no_grad()
def test_merged_in_either_order(first: str, tmp_path: Path) -> None:
    file = file_of(tmp_path)
    model = wrapped(Model())
    network = nerine.load(model, file)
    want = model(X)
    if first == "nerine":
        network.merge()
        close(model(X), want)
        merged = model.merge_and_unload()
        close(merged(X), want)
        with pytest.raises(
            MergeError, match=r"block\.lin: its weight was changed after the merge.*merge\(keep_original"
        ):
            network.unmerge()
        with pytest.raises(MergeError, match="its weight was changed after the merge"):
            network.detach()
        close(merged(X), want)
        network.merge(keep_original=False)
    else:
        merged = model.merge_and_unload()
        close(merged(X), want)
        assert [path for path, *_ in Network.of(merged).adapters()] == ["block.lin", "block.conv", "head"]
        network.merge()
        close(merged(X), want)
        network.unmerge()
        close(merged(X), want)
        network.merge(keep_original=False)
    network.detach()
    close(merged(X), want)
    assert merged.state_dict().keys() == Model().state_dict().keys()


@torch.no_grad()
def test_a_merge_of_peft_that_is_undone_may_be_in_between(tmp_path: Path) -> None:
    """Bit for bit in powers of two, where PEFT's subtraction is exact; else PEFT leaves a rounding that is told."""
    model = wrapped(Model())
    network = nerine.load(model, file_of(tmp_path))
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            for part in module.lora_B.values():
                part.weight.zero_()
    want = model(X)
    network.merge()
    model.merge_adapter()
    model.unmerge_adapter()
    network.unmerge()
    assert torch.equal(model(X), want)


@torch.no_grad()
def test_peft_around_an_adapted_model(tmp_path: Path) -> None:
    file = file_of(tmp_path)
    want_model = wrapped(Model())
    nerine.load(want_model, file)
    want = want_model(X)
    inner = Model().eval()
    network = nerine.load(inner, file)
    model = wrapped(inner)
    close(model(X), want)
    assert [path for path, *_ in network.adapters()] == ["block.lin", "block.conv", "head"]
    assert [path for path, *_ in Network.of(model).adapters()] == ["block.lin", "block.conv", "head"]
    assert not any(p.requires_grad for p in network.parameters())  # PEFT freezes all that is not its own
    network.requires_grad_()
    assert network.set_strength(0.5, "block.lin") == 1
    network.strength = 1
    network.merge()
    close(model(X), want)
    network.unmerge()
    close(copy.deepcopy(model)(X), want)
    nerine.save(network, tmp_path / "again.safetensors")
    assert (
        safetensors_torch.load_file(tmp_path / "again.safetensors").keys() == safetensors_torch.load_file(file).keys()
    )
    model.save_pretrained(tmp_path / "peft")
    assert not any(
        "nerine" in key for key in safetensors_torch.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    )
    nerine.load(network, file, strict=True)
    close(model(X), want)
    network.detach()
    close(model(X), wrapped(Model())(X))
    peft.PeftModel.from_pretrained(Model(), tmp_path / "peft")


def test_both_are_trained_or_one(tmp_path: Path) -> None:
    """`attach` freezes what was there, PEFT's adapters among it; with freeze=False both learn."""
    model = wrapped(Model())
    network = nerine.attach(model, LoHa(rank=2))
    theirs = [p for name, p in model.named_parameters() if "lora_" in name]
    model(X).square().sum().backward()
    assert all(p.grad is None for p in theirs)
    assert all(p.grad is not None for p in network.parameters())
    network.detach()
    assert all(p.requires_grad for p in theirs)
    network = nerine.attach(model, LoHa(rank=2), freeze=False)
    model(X).square().sum().backward()
    assert all(p.grad is not None for p in [*theirs, *network.parameters()])


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_layers_of_peft_in_a_model_of_no_class_of_its(tmp_path: Path) -> None:
    """As transformers' `add_adapter` leaves them, and below PEFT's model: the names of layers are the same."""
    plain = llama()
    network = nerine.attach(plain, LoRA(rank=2, alpha=3), targets="self_attn")
    stir(network.parameters())
    nerine.save(network, tmp_path / "a.safetensors")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    for model in (peft.inject_adapter_in_model(config, llama()), peft.get_peft_model(llama(), config).eval()):
        loaded = nerine.load(model, tmp_path / "a.safetensors", strict=True)
        assert [path for path, *_ in loaded.adapters()] == [path for path, *_ in network.adapters()]
        close(model(X).logits, plain(X).logits)  # PEFT's starts at no change


class Words(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = (torch.arange(8) * 3 + i * 5) % 40
        return {"input_ids": ids, "labels": ids}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_trainer_saves_and_resumes_both(tmp_path: Path) -> None:
    from nerine.integrations.transformers import SaveAdapters

    def trainer(folder: Path) -> tuple[Any, Network]:
        torch.manual_seed(5)
        model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))
        network = nerine.attach(model, LoKr(rank=2, factor=4), targets="self_attn", freeze=False)
        args = transformers.TrainingArguments(
            str(folder),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            report_to=[],
            learning_rate=1e-2,
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        made = transformers.Trainer(model, args, train_dataset=Words(), callbacks=[SaveAdapters(network)])
        made.remove_callback(transformers.PrinterCallback)
        return made, network

    whole, _ = trainer(tmp_path)
    whole.train()
    kept = safetensors_torch.load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert {key.split(".")[-1] if "nerine" in key else key.split(".")[-3] for key in kept} >= {"lora_A", "lora_B", "w1"}
    assert all(".nerine." in key or ".lora_" in key for key in kept)
    again, _ = trainer(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    want = whole.model.state_dict()
    assert all(torch.equal(t, want[key]) for key, t in again.model.state_dict().items())
