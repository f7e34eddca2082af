"""The tables of docs/which-algorithm.md and the README, from benchmarks/results/quality.json; run it to write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
PAGES = (ROOT / "docs" / "which-algorithm.md", ROOT / "README.md")
START, END = "<!-- quality table -->", "<!-- end of quality table -->"


def table(found: Mapping[str, Any]) -> str:
    """One row a contestant, by its loss; the base first."""
    lines = [
        "| | trained values | held-out loss | read right | learning rate |",
        "|---|---|---|---|---|",
        f"| before training | | {found['base']['loss']:.4f} | {found['base']['read']:.0%} | |",
    ]
    for row in sorted(found["rows"].values(), key=lambda row: row["loss"]):
        name = row["name"] if row["in_budget"] else f"{row['name']} ¹"
        lines.append(
            f"| {name} | {row['values']:,} | {row['loss']:.4f} ± {row['spread']:.4f} | {row['read']:.0%} "
            f"| {row['lr']:g} |"
        )
    return "\n".join(lines)


def page(text: str) -> str:
    """`text` with the table of the recorded results in its place."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    before, rest = text.split(START)
    return f"{before}{START}\n{table(found)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    for file in PAGES:
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if START in text:
            file.write_text(page(text), encoding="utf-8")


if __name__ == "__main__":
    main()
