"""The pages of the performance suite, made of its JSON and of nothing else: docs/performance.md, the whole table in
benchmarks/results/performance.md, and the picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from step_rows import EVAL_GOAL
from suite_cases import AGAIN, Figures
from suite_tables import COLUMNS, cells, shown, verdict
from suite_text import FLOORS, INTRO, MEASURED, OVERHEAD

__all__ = ["draw", "everything", "lycoris_best", "page", "unreached"]

SOURCE = "../benchmarks/"
PICTURED = ("linear-3072", "conv-320")
HEAD = (
    *("algorithm", "goal", "", "nerine", "median", "floor", "over", "by hand", "LyCORIS", "LyCORIS best", "PEFT"),
    *("eval", "cached", "eval LyCORIS", "eval PEFT", "kept", "peak", "peak LyCORIS", "peak PEFT"),
)

Group = dict[str, Figures]  # the contestants of one row


def _figures(found: Mapping[str, Any]) -> list[Figures]:
    return [Figures(**f) for f in found["figures"]]


def grouped(figures: Iterable[Figures]) -> dict[tuple[str, str, str], dict[str, Group]]:
    """By layer, precision and mode; then by row."""
    cases: dict[tuple[str, str, str], dict[str, Group]] = {}
    for f in figures:
        cases.setdefault((f.layer, f.precision, f.mode), {}).setdefault(f.row, {})[f.contestant] = f
    return cases


def lycoris_best(group: Group, what: str = "ratio") -> float | None:
    """The faster of LyCORIS's modes that compute the same as nerine."""
    modes = (group.get("LyCORIS"), group.get("LyCORIS bypass"))
    found = [getattr(f, what) for f in modes if f is not None and f.note in ("", "other gradients")]
    found = [ratio for ratio in found if ratio is not None]
    return min(found, default=None)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _of(group: Group, name: str, what: str = "ratio") -> str:
    """A figure of a contestant, with a star where there is a note."""
    f = group.get(name)
    if f is None or (getattr(f, what) is None and not f.note):
        return ""
    star = " *" if f.note else ""
    return ("fails" if f.ratio is None else shown(getattr(f, what))) + star


def _row(name: str, group: Group) -> list[str]:
    own = group["nerine"]
    fewer = any(0 < f.rounds < own.rounds for f in group.values())
    return [
        f"{name} !" if fewer else name,
        shown(own.goal),
        verdict(own.reached),
        f"**{shown(own.ratio)}**" if own.ratio is not None else "fails *",
        shown(own.median_ratio),
        shown(own.floor),
        "" if own.over_floor is None else f"{own.over_floor:+.0%}",
        _of(group, "by hand"),
        _of(group, "LyCORIS"),
        shown(lycoris_best(group)),
        _of(group, "PEFT"),
        shown(own.eval_ratio),
        shown(own.cached_ratio),
        shown(lycoris_best(group, "eval_ratio")),
        _of(group, "PEFT", "eval_ratio"),
        shown(own.kept),
        shown(own.peak),
        _of(group, "LyCORIS", "peak"),
        _of(group, "PEFT", "peak"),
    ]


def section(key: tuple[str, str, str], rows: Mapping[str, Group]) -> str:
    """One case."""
    figures = [f for group in rows.values() for f in group.values()]
    again = next((f for f in figures if f.contestant == AGAIN), None)
    rounds = max(f.rounds for f in figures)
    noise = "" if again is None else f"; frozen again: {shown(again.ratio)}, in eval {shown(again.eval_ratio)}"
    notes = sorted({f"{f.contestant}, {f.row}: {f.note}" for f in figures if f.note})
    parts = [
        f"### {key[0]}, {key[1]}, {key[2]}",
        f"{rounds} rounds{noise}.",
        table(HEAD, (_row(name, group) for name, group in rows.items() if "nerine" in group)),
    ]
    return "\n\n".join([*parts, *([f"\\* {'; '.join(notes)}"] if notes else [])])


def unreached(figures: Iterable[Figures]) -> list[str]:
    """Every goal that nerine missed, in words."""
    lines = []
    for f in (f for f in figures if f.contestant == "nerine"):
        where = f"{f.layer}, {f.precision}, {f.mode}, {f.row}"
        if f.reached is False:
            lines.append(f"{where}: step {shown(f.ratio)}, goal {shown(f.goal)} (floor {shown(f.floor)})")
        if f.eval_reached is False:
            cached = "" if f.cached_ratio is None else f", cached {shown(f.cached_ratio)}"
            lines.append(f"{where}: eval {shown(f.eval_ratio)}{cached}, goal {EVAL_GOAL:.2f}")
        if f.kept_reached is False:
            lines.append(f"{where}: keeps {f.weight_sized} of the weight's size and {f.output_sized} of the output's")
        if f.note:
            lines.append(f"{where}: {f.note}")
    return lines


# -- overhead ----------------------------------------------------------------------------------------------------
def overhead_section(found: Mapping[str, Any]) -> str:
    layer = table(
        ("algorithm", "contestant", "step µs", "× by hand", "eval µs", "× by hand"),
        (
            (
                *(one["row"], one["contestant"], shown(one["step_us"], 0), shown(one["step_multiple"], 1)),
                *(shown(one["eval_us"], 0), shown(one["eval_multiple"], 1)),
            )
            for one in found["layer"]
        ),
    )
    peers = list(dict.fromkeys(name for one in found["model"] for name in one["peers_ms"]))
    model = table(
        ("algorithm", "frozen ms", "nerine ms", "layers alone add ms", "lost", "goal 3 %", *(f"{n} ms" for n in peers)),
        (
            (
                *(one["row"], shown(one["frozen_ms"], 0), shown(one["adapted_ms"], 0), shown(one["layers_ms"], 0)),
                *(f"{one['lost']:.1%}", verdict(one["reached"])),
                *(shown(one["peers_ms"].get(name), 0) for name in peers),
            )
            for one in found["model"]
        ),
    )
    count = found["model"][0]["layers"] if found["model"] else 0
    words = (
        f"**A whole model.** SDXL's UNet at {found['width']:g} of its width, on latents of 8×8: {count} layers with "
        "little to do. Each\ndistinct layer is timed alone, frozen and adapted, and what the adapter adds is taken "
        "times its count. *Lost* is what the\nadapters add to the model's step beyond that sum, over the adapted step."
    )
    return "\n\n".join([OVERHEAD, layer, words, model])


# -- the pages -----------------------------------------------------------------------------------------------------
def page(found: Mapping[str, Any]) -> str:
    """docs/performance.md."""
    figures = _figures(found)
    missed = unreached(figures)
    parts = [
        INTRO,
        ", ".join(f"{key} {value}" for key, value in found["header"].items()) + ".",
        "![Training step over that of the frozen layer](images/performance.png)",
        MEASURED.format(eval_goal=EVAL_GOAL),
        "## Figures",
        *(section(key, rows) for key, rows in grouped(figures).items()),
        "## Goals not reached",
        "\n".join(f"- {line}" for line in missed) or "None.",
    ]
    if found.get("overhead"):
        parts.append(overhead_section(found["overhead"]))
    parts += [FLOORS.format(source=SOURCE), _again()]
    return "\n\n".join(parts) + "\n"


def _again() -> str:
    return """## Again

```sh
python benchmarks/suite.py                     # everything, about 25 minutes on two cores
python benchmarks/suite.py --layers linear-1280 --rows LoKr --precision bf16 --mode compiled --threads 1
python benchmarks/suite.py --pages             # this page and the picture, from the recorded figures
python benchmarks/suite.py --gate              # a few rows against recorded ratios; fails where 25 % are lost
```"""


def everything(found: Mapping[str, Any]) -> str:
    """benchmarks/results/performance.md: all that is known of everyone."""
    head = ", ".join(f"{key} {value}" for key, value in found["header"].items())
    whole = table((name or "verdict" for name in COLUMNS), map(cells, _figures(found)))
    return f"# The performance suite\n\n{head}\n\nSee ../README.md and ../../docs/performance.md.\n\n{whole}\n"


BARS = (("floor", "#b9b9b9"), ("nerine", "#2f6db5"), ("LyCORIS", "#e2a04a"), ("PEFT", "#7aa874"))


def bar_values(group: Group) -> dict[str, float]:
    """The lengths of the bars of one algorithm."""
    own, peft = group["nerine"], group.get("PEFT")
    values = {
        "floor": own.floor,
        "nerine": own.ratio,
        "LyCORIS": lycoris_best(group),
        "PEFT": None if peft is None or peft.note.startswith(("fails", "another")) else peft.ratio,
    }
    return {name: value for name, value in values.items() if value is not None}


def draw(found: Mapping[str, Any], file: Path) -> None:
    """Horizontal bars for each algorithm of the pictured layers, in fp32 and eager."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = grouped(_figures(found))
    present = [layer for layer in PICTURED if (layer, "fp32", "eager") in cases]
    longest = max((len(cases[layer, "fp32", "eager"]) for layer in present), default=1)
    figure, axes = pyplot.subplots(1, max(1, len(present)), figsize=(5.2 * max(1, len(present)), 0.9 + 0.5 * longest))
    for layer, axis in zip(present, [axes] if len(present) < 2 else axes, strict=False):
        rows = cases[layer, "fp32", "eager"]
        for number, group in enumerate(rows.values()):
            values = bar_values(group) if "nerine" in group else {}
            for place, (name, colour) in enumerate(BARS):
                if name in values:
                    axis.barh(number + (place - 1.5) * 0.2, values[name], 0.19, color=colour)
        axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
        axis.invert_yaxis()
        axis.axvline(1.0, color="#444444", linewidth=0.8)
        axis.set_title(f"{layer}, fp32: training step over the frozen layer's", fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for _, colour in BARS]
    names = [name if name != "LyCORIS" else "LyCORIS, best mode" for name, _ in BARS]
    figure.legend(handles, names, loc="lower center", ncols=len(BARS), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
