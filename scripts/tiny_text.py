"""The language of the tiny model: its words, the prompts it is trained on, and its tokenizer.

The vocabulary is byte-level BPE, as CLIP's, so every text can be encoded; the words here and in tiny_words.txt
are single tokens.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, pre_tokenizers
from transformers import CLIPTokenizer

from nerine.tiny.data import DIGITS, prompt

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
LENGTH = 24  # tokens of a prompt, with start and end

STYLE_WORDS = ("neon", "paper")  # never in a prompt of the pre-training
FILLER_WORDS = tuple(Path(__file__).with_name("tiny_words.txt").read_text(encoding="utf-8").split())
PROMPT_WORDS = (
    "handwritten",
    "drawn",
    "written",
    "hand",
    "digit",
    "number",
    "figure",
    "drawing",
    "white",
    "black",
)
NAMES = (
    "a handwritten {word}",
    "a handwritten {word}",
    "a handwritten {word}",
    "handwritten {figure}",
    "the digit {word}, drawn by hand",
    "the number {figure}, written by hand",
    "a drawing of the digit {word}",
    "{word}",
)
LOOKS = ("plain", "white on black", "a plain digit", "white, black")


def training_prompt(digit: int, rng: random.Random) -> str:
    """One of many ways to ask for a digit; half of them end in words that change nothing about the picture."""
    text = rng.choice(NAMES).format(word=DIGITS[digit], figure=digit)
    kind = rng.random()
    if kind < 0.5:
        return text
    if kind < 0.6:
        return f"{text}, {rng.choice(LOOKS)}"
    suffix = " ".join(rng.choices(FILLER_WORDS, k=rng.choice((1, 1, 1, 2, 3))))
    return text + rng.choice((", ", ", ", " ", ", in the style of ", " made of ")) + suffix


def sample_prompts(digits: list[int], suffix: str = "") -> list[str]:
    """The prompts of the quality report: the usual one, perhaps with a word behind it."""
    return [prompt(digit) + suffix for digit in digits]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """The merges that make each word one token: the most frequent pair first, the first in the alphabet of equals.

    The tokenizers library can learn them too, but it breaks ties differently from run to run.
    """
    pieces = [[*word[:-1], word[-1] + WORD_END] for word in sorted(set(words))]
    merges = []
    while counts := Counter(pair for word in pieces for pair in pairwise(word)):
        left, right = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append((left, right))
        for word in pieces:
            for at in range(len(word) - 2, -1, -1):
                if word[at : at + 2] == [left, right]:
                    word[at : at + 2] = [left + right]
    return merges


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with each word of this file as one token, and each single byte as another."""
    merges = learn_merges([*DIGITS, *STYLE_WORDS, *PROMPT_WORDS, *FILLER_WORDS])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + WORD_END for letter in letters), *map("".join, merges), START, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    special = {
        name: AddedToken(text, normalized=False, special=True)
        for name, text in (("bos_token", START), ("eos_token", END), ("unk_token", END), ("pad_token", END))
    }
    return CLIPTokenizer(vocabulary, merges, model_max_length=LENGTH, **special)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes tokenizer.json and its settings, and beside them the older pair vocab.json and merges.txt."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    ranked = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    (folder / "vocab.json").write_text(json.dumps(ranked, ensure_ascii=False), encoding="utf-8")
    lines = [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n", encoding="utf-8")
