"""The table of docs/devices.md: `python -m devices.table` (in `tests/`) runs every route and writes it anew."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "devices.md"
START, END = "<!-- routes: written by tests/devices/table.py -->", "<!-- end of routes -->"

Row = tuple[str, str, str, str]  # route, algorithm, form, what went wrong


def cells(rows: Iterable[Row]) -> dict[tuple[str, str], str]:
    """For each route and algorithm how many of its forms passed of how many."""
    counts: dict[tuple[str, str], list[int]] = {}
    for route, name, _, failure in rows:
        passed = counts.setdefault((route, name), [0, 0])
        passed[0] += not failure
        passed[1] += 1
    return {key: f"{passed}/{of}" for key, (passed, of) in counts.items()}


def written(found: dict[tuple[str, str], str]) -> str:
    """The table in Markdown: a row for each route, a column for each algorithm."""
    routes = list(dict.fromkeys(route for route, _ in found))
    names = list(dict.fromkeys(name for _, name in found))
    lines = [f"| route | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines += [f"| {route} | {' | '.join(found[route, name] for name in names)} |" for route in routes]
    return "\n".join(lines)


def recorded() -> dict[tuple[str, str], str]:
    """What the document says."""
    text = DOCUMENT.read_text(encoding="utf-8")
    lines = text[text.index(START) : text.index(END)].splitlines()[1:]
    table = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    names = table[0][1:]
    return {(row[0], name): cell for row in table[2:] for name, cell in zip(names, row[1:], strict=True)}


def main() -> None:
    import simulated_cuda
    from simulated_cuda import build

    simulated_cuda.install(str(build.library()))
    from devices import routes

    rows = []
    for row in routes.run():
        rows.append(row)
        if row[3]:
            print(*row[:3], row[3], sep="\n", file=sys.stderr)
    text = DOCUMENT.read_text(encoding="utf-8")
    before, after = text[: text.index(START)], text[text.index(END) :]
    DOCUMENT.write_text(f"{before}{START}\n{written(cells(rows))}\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
