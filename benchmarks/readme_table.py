"""The table of the README, made from benchmarks/results/performance.json; run it to write the table there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "performance.json"
README = ROOT / "README.md"
START, END = "<!-- step table -->", "<!-- end of step table -->"
SMALL, LARGE = "linear-1280", "linear-3072"
ROWS = ("LoRA", "DoRA(LoRA)", "LoKr", "DoRA(LoKr)", "LoHa")
CONTESTANTS = ("nerine", "LyCORIS", "LyCORIS bypass", "PEFT")


def table(figures: list[dict[str, Any]]) -> str:
    """Ratios to the frozen layer, one row an algorithm; in brackets those of the larger layer, where recorded."""
    shown = [f for f in figures if (f["precision"], f["mode"]) == ("fp32", "eager")]
    found = {(f["row"], f["contestant"], f["layer"]): f["ratio"] for f in shown}
    lines = [
        "| Linear 1280, 1,024 tokens (Linear 3072, 2,048 tokens) | nerine | LyCORIS default | LyCORIS bypass | PEFT |",
        "|---|---|---|---|---|",
    ]
    for row in ROWS:
        cells = []
        for contestant in CONTESTANTS:
            small, large = (found.get((row, contestant, layer)) for layer in (SMALL, LARGE))
            cell = "" if small is None else f"{small:.2f}" + ("" if large is None else f" ({large:.2f})")
            cells.append(f"**{cell}**" if contestant == "nerine" else cell)
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def readme(text: str) -> str:
    """`text` with the table of the recorded results in its place."""
    figures = json.loads(RESULTS.read_text(encoding="utf-8"))["figures"]
    before, rest = text.split(START)
    return f"{before}{START}\n{table(figures)}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
