"""What mkdocs is told beyond its settings: pages from outside docs/, links that lead out of it, pictures in the page.

The documents are read in two places, in the repository and on the site. Their links are those of the repository; here
they become those of the site: to a page where the site has one, else the plain path of the file. Pictures of algorithms
are put into the page itself, so that they take the colours of the page. Nothing here knows what a page says.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

__all__ = [
    "ORIGINS",
    "inlined",
    "on_files",
    "on_page_content",
    "on_page_markdown",
    "on_post_page",
    "relinked",
    "unescaped",
]

ROOT = Path(__file__).resolve().parents[2]
ORIGINS = {  # pages of the site that live elsewhere in the repository
    "contributing.md": "CONTRIBUTING.md",
    "benchmarks.md": "benchmarks/README.md",
    "examples.md": "examples/README.md",
}
_PAGES = {origin: page for page, origin in ORIGINS.items()} | {"README.md": "index.md"}
_LINK = re.compile(r"(?<!!)\[(?P<label>[^\[\]]*)\]\((?P<target>[^()\s#:]+)(?P<anchor>#[^()\s]*)?\)")
_FENCE = re.compile(r"^(?P<fence>```+|~~~+).*?^(?P=fence)[ \t]*$", re.MULTILINE | re.DOTALL)
_PICTURE = re.compile(
    r'<img(?=[^>]*\salt="(?P<alt>[^"]*)")[^>]*\ssrc="[^"]*?images/algorithms/(?P<name>[\w-]+)\.svg"[^>]*>'
)
_ROW, _CODE = re.compile(r"^\|.*\|$", re.MULTILINE), re.compile(r"`[^`]+`")
_STYLE = re.compile(r"<style>.*?</style>\s*", re.DOTALL)


def relinked(markdown: str, page: str) -> str:
    """The text of `page` (its path on the site) with the links of the repository made into those of the site."""
    folder = posixpath.dirname(ORIGINS.get(page, f"docs/{page}"))

    def link(match: re.Match[str]) -> str:
        label, anchor = match["label"], match["anchor"] or ""
        target = posixpath.normpath(posixpath.join(folder, match["target"]))
        inside = target.removeprefix("docs/") if target.startswith("docs/") else _PAGES.get(target)
        if inside is not None:
            return f"[{label}]({posixpath.relpath(inside, posixpath.dirname(page) or '.')}{anchor})"
        return f"`{target}`" if label.strip("`") in target else f"{label} (`{target}`)"

    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):  # code is left alone
        parts += [_LINK.sub(link, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(link, markdown[end:])])


def unescaped(markdown: str) -> str:
    """`markdown` with the bars in the code of tables as they are: GitHub wants them escaped, mkdocs does not."""

    def row(match: re.Match[str]) -> str:
        return _CODE.sub(lambda code: code[0].replace("\\|", "|"), match[0])

    return _ROW.sub(row, markdown)


def inlined(html: str, docs: Path) -> str:
    """`html` with the pictures of algorithms in place of references to them; the stylesheet has the colours."""

    def picture(match: re.Match[str]) -> str:
        text = (docs / "images" / "algorithms" / f"{match['name']}.svg").read_text(encoding="utf-8")
        label = f'<svg role="img" aria-label="{match["alt"]}"'
        return f'<span class="structure-frame">{_STYLE.sub("", text).replace("<svg", label, 1).strip()}</span>'

    return _PICTURE.sub(picture, html)


def on_files(files: Any, config: Any) -> Any:
    """The pages that live outside docs/ join the others."""
    for page, origin in ORIGINS.items():
        files.append(File.generated(config, page, content=(ROOT / origin).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    return unescaped(relinked(markdown, page.file.src_uri))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    return inlined(html, Path(config.docs_dir))


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Pages in Chinese say so, for fonts and for readers aloud."""
    language = "zh-Hans" if page.file.src_uri.startswith("zh/") else "en"
    return output.replace('<html lang="en"', f'<html lang="{language}"', 1)
