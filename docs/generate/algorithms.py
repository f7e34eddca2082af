"""The pages of the algorithms: `pages()` makes all of them, `scripts/docs --generate` writes them.

A page is put together from sections, each a function of an `Entry`. What is said stands in algorithms.toml, what is
counted in `facts`; here is only the form.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from entries import Entry, entries, meanings
from facts import (
    LAYERS,
    dialects,
    lycoris_names,
    places,
    plan_row,
    quality,
    readers,
    started,
    step_ratios,
    tensors,
)
from pictures import draw, formula_in_words

from nerine import DoRA, LoRA
from nerine.algorithms import Algorithm
from nerine.files.atomic import write_text

__all__ = ["DOCS", "page", "pages"]

DOCS = Path(__file__).resolve().parents[1]
HEAD = "<!-- written by docs/generate/algorithms.py; `scripts/docs --generate` writes it again -->"
FIRM = "\N{NO-BREAK SPACE}"
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def pages() -> dict[str, str]:
    """Every generated file, by its path below docs/."""
    found = {"algorithms/index.md": overview(entries().values())}
    for entry in entries().values():
        found[entry.page] = page(entry)
        found[f"images/algorithms/{entry.name}.svg"] = draw(entry)
    return found


def page(entry: Entry) -> str:
    """The page of one algorithm."""
    sections = (head, use, recommended, settings, in_files, cost, reading, program)
    return "\n\n".join(section(entry).strip() for section in sections) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cited(text: str) -> str:
    """`text` with its papers as links."""
    return ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def _sources(entry: Entry) -> str:
    """The papers, from the docstring of the class."""
    text = " ".join((entry.cls.__doc__ or "").split())
    return _cited(text.partition("Source: ")[2].partition(" Raises")[0].rstrip("."))


def _call(algorithm: Algorithm) -> str:
    return f"`{algorithm}`"


def head(entry: Entry) -> str:
    """Title, formula, picture, names."""
    own = "nerine." + entry.cls.__name__
    lycoris = ", ".join(f"`algo={word}`" for word in lycoris_names(entry.name))
    if entry.cls is DoRA:
        lycoris, rules = "`dora_wd=True`, with any `algo` that has it", '`algorithm = "dora"`, `inner = {...}`'
    else:
        rules = f'`algorithm = "{entry.name}"`'
    command = "`--dora`" if entry.cls is DoRA else f"`--algo {entry.name}`"
    if entry.name == "norm":
        command, lycoris = "`--train-norm`", "`train_norm=True`"
    alt = f"{entry.title}: {formula_in_words(entry)}"
    names = table(
        ["where", "what it is called"],
        [
            ["Python", f"`{own}`"],
            ["`nerine train`", command],
            ["rules in TOML", rules],
            ["sd-scripts, LyCORIS", lycoris],
            ["source", _sources(entry) or entry.cls.source],
        ],
    )
    picture = f"![{alt}](../images/algorithms/{entry.name}.svg)"
    caption = f"\n\n*{entry.caption}*" if entry.caption else ""
    return (
        f"# {entry.title}\n\n{HEAD}\n\n{entry.about}\n\n```text\n{entry.formula}\n```\n\n{picture}{caption}\n\n{names}"
    )


def use(entry: Entry) -> str:
    take, leave = ("\n".join(f"- {text}" for text in texts) for texts in (entry.take, entry.leave))
    return f"## When to take it\n\nTake it when\n\n{take}\n\nTake another one when\n\n{leave}"


def recommended(entry: Entry) -> str:
    """Advice, and what the study measured beside it."""
    text = f"## Settings to begin with\n\n{entry.recommended}"
    rows = [row for name in ("LoRA", *entry.quality) if (row := quality(name)) is not None]
    rows = list({row["name"]: row for row in rows}.values())
    if not entry.quality:
        return text + "\n\nThe [study of all algorithms on the tiny model](../which-algorithm.md) has no row for it."
    cells = [
        [
            row["name"],
            f"`{_settings_of(row)}`",
            f"{row['values']:,}",
            f"{row['loss']:.4f}{FIRM}±{FIRM}{row['spread']:.4f}",
            f"{row['read']:.0%}",
            f"{row['lr']:g}",
        ]
        for row in rows
    ]
    header = ["", "settings", "trained values", "held-out loss", "read right", "learning rate"]
    return (
        f"{text}\n\nMeasured on the [tiny model](../tiny-model.md) in one minute of training, as "
        f"[which algorithm](../which-algorithm.md) tells, each with the best learning rate of a grid. The model is "
        f"small, and its rates are far above those of large models; what carries over is their ratio to LoRA's.\n\n"
        f"{table(header, cells)}"
    )


def _settings_of(row: Mapping[str, str]) -> str:
    return str(row["settings"]).replace("'", "")


def settings(entry: Entry) -> str:
    """Every field of the class."""
    words = meanings(entry)
    rows = []
    for f in dataclasses.fields(entry.cls):
        default = "" if f.default is dataclasses.MISSING else f"`{f.default!r}`"
        rows.append([f"`{f.name}`", f"`{f.type}`".replace("|", "\\|"), default, words[f.name]])
    rows = [[name, kind.replace("`float \\| None`", "`float` or `None`"), *rest] for name, kind, *rest in rows]
    rows = [[name, kind.replace("`int \\| None`", "`int` or `None`"), *rest] for name, kind, *rest in rows]
    return f"## Settings\n\n{table(['setting', 'type', 'default', ''], rows)}{_options(entry)}"


def _options(entry: Entry) -> str:
    """How the settings are spelled elsewhere."""
    found = lycoris_names(entry.name)
    options = dict.fromkeys(option for words in found.values() for option in words)
    if not options or entry.name == "norm":
        return ""
    listed = ", ".join(f"`{option}`" for option in options)
    return f"\n\nIn sd-scripts' `network_args` and LyCORIS's presets: {listed}."


def in_files(entry: Entry) -> str:
    """Tensors, keys and shapes."""
    algorithm = entry.algorithm
    shown = places(algorithm)
    rows = [
        [
            f"`{t.name}`",
            f"`{t.key}`",
            f"`{t.axes.replace(' ', FIRM)}`",
            t.start if t.trained else f"{t.start}, not trained",
        ]
        + ["" if shape is None else f"{FIRM}×{FIRM}".join(map(str, shape)) for shape in t.shapes]
        for t in tensors(algorithm)
    ]
    header = ["tensor", "key in a file", "axes", "starts as", *(place.title for place in shown)]
    layout = algorithm.design(shown[0].site).layout
    alpha = {
        "scale": "A scalar `alpha` beside them says by what the change is multiplied (alpha / rank).",
        "constraint": "A scalar `alpha` beside them holds the bound of the rotation.",
        "": "There is no `alpha`.",
    }[layout.alpha]
    marks = "".join(f" A key `{key}` holds {int(value)} here." for key, value in layout.marks.items())
    if algorithm.kinds == LoRA.kinds:
        axes = "`out` and `in` are the channels of the layer, `*k` its kernel; `*1` and `?1` are ones on convolutions."
    else:
        axes = "`out *k` is the shape of the norm's own scale."
    return (
        f"## What is trained and stored\n\n{_call(algorithm)} on example layers. In a file each key stands behind the "
        f"name of its layer. {axes}\n\n{table(header, rows)}\n\n{alpha}{marks}{_other_layouts(entry)}"
    )


def _other_layouts(entry: Entry) -> str:
    """Forms in which other settings or other programs store it."""
    algorithm = entry.algorithm
    own = {tuple(s.key for s in algorithm.design(place.site).layout.specs.values()) for place in places(algorithm)}
    others = list(dict.fromkeys(tuple(s.key for s in layout.specs.values()) for layout in algorithm.layouts))
    lines = [f"- {', '.join(f'`{key}`' for key in keys)}" for keys in others if keys not in own]
    return "\n\nOther settings, and files of other programs, have\n\n" + "\n".join(lines) if lines else ""


def cost(entry: Entry) -> str:
    """Values, multiply-adds and measured steps."""
    algorithm, lora, rows = entry.algorithm, LoRA(rank=16), []
    for place in places(algorithm):
        row = plan_row(algorithm, place)
        beside = plan_row(lora, place).params if place.site.kind != "norm" else 0
        share = f"{row.params / beside:.2f}" if beside else ""
        rows.append([place.title, f"{row.params:,}", share, f"{row.cost:.1%}", row.path])
    header = ["layer", "trained values", "over LoRA rank 16", "multiply-adds over the layer's", "way"]
    ways = (
        "*factored*: beside the weight; *input*: a changed input and the layer's own weight; *weight*: the changed "
        "weight is built in each step; *module*: the layer itself with other values."
    )
    text = f"## What it costs\n\n{table(header, rows)}\n\nWays, as `nerine.plan` shows them. {ways}"
    return f"{text}\n\n{_steps(entry)}"


def _steps(entry: Entry) -> str:
    """Measured training steps."""
    rows = [
        [name, LAYERS[layer], *(f"{ratios[who]:.2f}" if who in ratios else "" for who in ("nerine", "LyCORIS", "PEFT"))]
        for name in entry.performance
        for layer, ratios in step_ratios(name).items()
    ]
    if not rows:
        return "A step with it is not among the [measured ones](../performance.md)."
    header = ["", "layer", "nerine", "LyCORIS, its faster way", "PEFT"]
    return (
        "A training step (forward and backward) over that of the frozen layer, measured on two CPU cores in fp32 at "
        "rank 16, factor 8, blocks of 32 ([performance](../performance.md)). Empty where a program has no such adapter "
        f"or computes something else; less than 1 is the noise of the run.\n\n{table(header, rows)}"
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _variants(entry: Entry) -> list[Algorithm]:
    """The algorithm at its defaults, and with the settings that other programs take differently."""
    return [entry.algorithm, *(dataclasses.replace(entry.algorithm, **settings) for settings in entry.variants)]


def reading(entry: Entry) -> str:
    """What it can be combined with, and who reads its files."""
    algorithm, site = entry.algorithm, places(entry.algorithm)[0].site
    around = entry.cls is not DoRA and not DoRA(algorithm).unsuited(site)
    facts = [
        ["acts on", ", ".join(sorted(algorithm.kinds))],
        ["DoRA around it", _yes(around) if entry.cls is not DoRA else "it is DoRA"],
        ["merges exactly", "yes: one sum in fp32, one rounding, and `unmerge` gives back the exact bits"],
        ["several on one layer", _stacking(algorithm.is_fixed(started(algorithm, site)))],
        ["`nerine extract` can make it", _yes(type(algorithm).fit is not Algorithm.fit)],
    ]
    return f"## With others\n\n{table(['', ''], facts)}\n\n{_readers(entry)}"


def _stacking(is_fixed: bool) -> str:
    if is_fixed:
        return "yes; the change is the same whatever else is merged"
    return "yes; the change depends on the weight, so that merging another adapter for good alters it"


def _readers(entry: Entry) -> str:
    """Programs by variant; then the dialects."""
    variants = _variants(entry)
    found = [readers(variant) for variant in variants]
    rows = []
    for program in found[0]:
        cells = [_level(*of_variant[program]) for of_variant in found]
        rows.append([program, *cells])
    held = [name for name, why in dialects(entry.algorithm).items() if not why]
    header = ["read by", *(_call(variant) for variant in variants)]
    return (
        f"### Who reads the file\n\n{table(header, rows)}\n\nIn brackets the first dialect in which it is so. Dialects "
        f"that can hold it: {', '.join(f'`{name}`' for name in held)}. [Files](../files.md) has all of them."
    )


def _level(level: str, dialect: str) -> str:
    return {"exact": f"exactly (`{dialect}`)", "near": f"nearly (`{dialect}`)", "no": "no"}[level]


PROGRAM = """
```python
import torch
from torch import nn

import nerine


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), {layer})


trained = model()
network = nerine.attach(trained, nerine.{example})
optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
x, wanted = torch.randn(16, 32), torch.randn(16, {out})
for _ in range(2):
    optimizer.zero_grad()
    (trained(x) - wanted).square().mean().backward()
    optimizer.step()

with torch.no_grad():
    adapted = trained.eval()(x)
    assert not torch.allclose(adapted, model()(x))  # it has learned something
    nerine.save(network, "{name}.safetensors")
    network.merge()
    torch.testing.assert_close(trained(x), adapted)  # merged
    other = model().eval()
    nerine.load(other, "{name}.safetensors")
    torch.testing.assert_close(other(x), adapted)  # saved and read again
```
"""


def program(entry: Entry) -> str:
    """Two steps of training, a merge, and the way through a file."""
    is_norm = entry.algorithm.kinds != LoRA.kinds
    layer, out = ("nn.LayerNorm(64)", 64) if is_norm else ("nn.SiLU(), nn.Linear(64, 48)", 48)
    code = PROGRAM.format(layer=layer, example=entry.example, out=out, name=entry.name)
    return f"## A program\n\nIt trains two steps, merges, saves and reads again:\n\n{code.strip()}"


def overview(found: Iterable[Entry]) -> str:
    """All algorithms on one page."""
    found = list(found)
    text = (
        f"# Algorithms\n\n{HEAD}\n\nEvery algorithm is a map of a weight W to a weight W'. What the adapted layer "
        "computes in training is what the merged weight computes and what the file says. DoRA goes around any of them "
        "but norms; [which algorithm](../which-algorithm.md) compares what they learn."
    )
    return f"{text}\n\n{_all_in_a_table(found)}\n\n## Pictures\n\n{_cards(found)}\n"


def _all_in_a_table(found: Sequence[Entry]) -> str:
    rows = []
    for entry in found:
        place = places(entry.algorithm)[0]
        measured = step_ratios(entry.performance[0]).get("linear-1280", {}) if entry.performance else {}
        row = quality(entry.quality[0]) if entry.quality else None
        cells = [
            f"[{entry.title}]({entry.name}.md)",
            "`" + entry.formula.replace("|", "∣") + "`",
            f"{plan_row(entry.algorithm, place).params:,}",
            f"{measured['nerine']:.2f}" if measured else "",
            f"{row['loss']:.4f}" if row else "",
        ]
        rows.append(cells)
    header = ["", "W'", "trained values", "step", "held-out loss"]
    notes = (
        "Trained values: at the defaults on a Linear 320 → 640 (Norm: LayerNorm 640; DoRA: around LoRA). Step: forward "
        "and backward over the frozen layer's, on a Linear of 1280, [measured](../performance.md) at rank 16. Held-out "
        "loss: on the [tiny model](../tiny-model.md) with about the same number of values for each, but few for (IA)³ "
        "and Norm and very many for Full."
    )
    return f"{table(header, rows)}\n\n{notes}"


def _cards(found: Sequence[Entry]) -> str:
    cards = []
    for entry in found:
        alt = f"{entry.title}: {formula_in_words(entry)}"
        cards.append(f"-   **[{entry.title}]({entry.name}.md)**\n\n    ![{alt}](../images/algorithms/{entry.name}.svg)")
    return '<div class="grid cards" markdown>\n\n' + "\n\n".join(cards) + "\n\n</div>"


def main() -> None:
    for name, text in pages().items():
        (DOCS / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(DOCS / name, text)


if __name__ == "__main__":
    main()
