"""The table of all settings in docs/training.md, made from the settings themselves; run it to write the table there."""

from __future__ import annotations

from pathlib import Path

from nerine.train.settings import keys

PAGE = Path(__file__).resolve().parents[1] / "docs" / "training.md"
START, END = "<!-- settings -->", "<!-- end of settings -->"


def table() -> str:
    """One row a key, a head for each section."""
    lines, section = [], ""
    for one in keys():
        if one.section != section:
            section = one.section
            lines += ["", f"**[{section}]**", "", "| key | option | default | |", "|---|---|---|---|"]
        default = "" if one.default in (None, (), {}, "") else f"`{str(one.default).lower()}`"
        choices = f" ({', '.join(one.choices)})" if one.choices else ""
        lines.append(f"| `{one.name}` | `{one.option}` | {default} | {one.about}{choices} |")
    return "\n".join(lines[1:])


def page(text: str) -> str:
    """`text` with the table of the settings in its place."""
    before, rest = text.split(START)
    return f"{before}{START}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
