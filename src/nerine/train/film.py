"""The pictures drawn on the way, as a table for a page: a row a prompt, a column a step. It knows the folder of samples
and nothing of the run that drew them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from nerine.errors import MissingExtra
from nerine.tools.pages.marks import Markup, joined, mark, words

__all__ = ["evenly", "film"]

MOST_COLUMNS, MOST_ROWS = 8, 8
LARGEST, TINY = 256, 64  # pixels of the longer side: larger ones are shrunk, tiny ones shown with hard edges


def film(folder: Path, prompts: Sequence[str]) -> Markup:
    """The pictures of `folder`, <step>/<number of the prompt>.png, at evenly chosen steps; nothing where it has none.

    Raises:
        MissingExtra: there are pictures and Pillow is not installed.
    """
    found = _drawn(folder)
    if not found:
        return Markup()
    steps = [sorted(found)[at] for at in evenly(len(found), MOST_COLUMNS)]
    numbers = sorted({number for files in found.values() for number in files})
    body: list[Markup] = []
    for number in numbers[:MOST_ROWS]:
        said = prompts[number] if number < len(prompts) else f"prompt {number + 1}"
        body.append(mark("tr", mark("th", mark("span", words(said, 400)), colspan=len(steps), scope="rowgroup")))
        body.append(mark("tr", *(mark("td", _picture(found[step].get(number), said, step)) for step in steps)))
    heads = [mark("th", f"step {step:,}" if step else "before", scope="col") for step in steps]
    table = mark("table", mark("thead", mark("tr", *heads)), mark("tbody", *body), class_="film")
    label = {"role": "region", "aria_label": "Pictures, can be scrolled"}
    return joined([_about(found, len(steps), numbers), mark("div", table, class_="scroll", tabindex="0", **label)])


def _about(found: Mapping[int, Mapping[int, Path]], shown: int, numbers: Sequence[int]) -> Markup:
    text = "Every prompt is drawn from the same noise each time."
    if shown < len(found) or len(numbers) > MOST_ROWS:
        rows = f"{min(len(numbers), MOST_ROWS)} of {len(numbers)} prompts"
        text += f" Shown are {rows} at {shown} of {len(found)} steps; all are in samples/."
    return mark("p", text)


def _drawn(folder: Path) -> dict[int, dict[int, Path]]:
    """{step: {number of the prompt: file}}."""
    found: dict[int, dict[int, Path]] = {}
    for file in folder.glob("*/*.png"):
        if file.parent.name.isdecimal() and file.stem.isdecimal():
            found.setdefault(int(file.parent.name), {})[int(file.stem)] = file
    return found


def _picture(file: Path | None, prompt: str, step: int) -> Markup:
    """A picture inside of the page, no larger than it is shown; words where it is missing or damaged."""
    if file is None:
        return mark("span", "none", class_="quiet")
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra(f'the page shows pictures through Pillow ({error}): pip install "nerine[train]"') from error
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # Pillow calls some damaged files errors of syntax
        return mark("span", words(f"cannot be read: {error}", 120), class_="quiet")
    is_tiny = max(image.size) <= TINY
    image.thumbnail((LARGEST, LARGEST))
    kind, out = "png" if is_tiny else "jpeg", io.BytesIO()
    image.save(out, format=kind, **({} if is_tiny else {"quality": 85}))
    source = f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
    width, height = image.size
    # not through `mark`, which cuts long attributes: base64 has no letter that could be markup
    told = f'width="{width}" height="{height}" alt="{words(prompt, 200)}, step {step}"'
    return Markup(f'<img src="{source}" {told}{" class=tiny" if is_tiny else ""}>')


def evenly(count: int, most: int) -> list[int]:
    """Up to `most` of the numbers below `count`, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
