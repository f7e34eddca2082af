"""The page docs/troubleshooting.md, made from src/nerine/troubles.toml: one section for each entry of `nerine explain`.

Run as a program it writes the page; `pages` is what a program that makes all pages asks for.
"""

from __future__ import annotations

import re
from pathlib import Path

from nerine.troubles import Trouble, troubles

__all__ = ["pages"]

_DOCS = Path(__file__).parent.parent
_HEAD = """# Troubleshooting

<!-- Made by docs/generate/troubles.py from src/nerine/troubles.toml; edit that and run it again. -->

Every error of nerine ends with a line such as

```text
More: nerine explain wrong-model
```

`nerine explain wrong-model` shows the section of that name below. `nerine explain` alone lists all of them, and
`nerine explain "..."` finds the section for the text of an error, also for some errors of torch and of other programs.
In Python the line stands under the traceback (Python 3.11 and newer).
"""


def pages() -> dict[Path, str]:
    """{path: text} of the page."""
    entries = list(troubles().values())
    lines = [_HEAD, "| What happened | |", "|---|---|"]
    lines += [f"| {_escaped(entry.title)} | [{entry.key}](#{entry.key}) |" for entry in entries]
    lines += ["", *(_section(entry) for entry in entries)]
    return {_DOCS / "troubleshooting.md": "\n".join(lines).rstrip() + "\n"}


def _section(entry: Trouble) -> str:
    steps = [f"{number}. {_escaped(step)}" for number, step in enumerate(entry.steps, 1)]
    more = [f"\nRead more: [{entry.page.removesuffix('.md')}]({entry.page})"] if entry.page else []
    return "\n".join(
        [f"## {entry.key}", "", f"**{_escaped(entry.title)}.** {_escaped(entry.means)}", "", *steps, *more, ""]
    )


def _escaped(text: str) -> str:
    """Markdown's own letters outside of code as letters."""
    return "".join(
        part if at % 2 else re.sub(r"([*<>\[\]_|])", r"\\\1", part)
        for at, part in enumerate(re.split(r"(`[^`]*`)", text))
    )


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
