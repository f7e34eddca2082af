"""The folders that the web app may read and write, and the check that every path goes through before a tool sees it.

A path is taken as the system takes it, with all symbolic links followed, and must end up in one of the folders. What is
uploaded can be read, and never written to. This file knows nothing of the web.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nerine.errors import OptionError, shown
from nerine.tools.inspect.text import bytes_of

__all__ = ["Folders"]

LONGEST_PATH = 4096
MOST_FILES, MOST_VISITED, DEEPEST = 1000, 20_000, 6  # of the list to pick from
MOST_IN_FOLDER = 20_000  # entries of a folder that is read as one thing
TENSORS, INDEX = ".safetensors", ".safetensors.index.json"
_WINDOWS = re.compile(r"^[a-zA-Z]:|\\")


class Folders:
    """The folders that may be read and written; `uploads` may be read alone. Relative paths start at the first one.

    Raises:
        OptionError: one of them is no folder.
    """

    def __init__(self, roots: Iterable[str | os.PathLike[str]], uploads: str | os.PathLike[str] | None = None) -> None:
        given = [Path(root) for root in roots]
        for root in given:
            if not root.is_dir():
                raise OptionError(f"--folder {root}: expected a folder that exists")
        self.roots = tuple(dict.fromkeys(Path(os.path.realpath(root)) for root in given))
        if not self.roots:
            raise OptionError("--folder: name at least one folder that may be read and written")
        self.uploads = None if uploads is None else Path(os.path.realpath(uploads))
        self._uploaded: dict[str, str] = {}

    # -- checks --------------------------------------------------------------------------------------------------------
    def reading(self, text: str, what: str = "file") -> Path:
        """The file or folder that may be read; `what` is what the page calls it.

        Raises:
            OptionError: it lies outside, is not there, or is neither a file nor a folder; or a folder holds a link
                that leads outside.
        """
        path = self._inside(text, what, self._readable)
        if not path.exists():
            raise OptionError(f"{what}: there is no {self.shown(path)}; pick one of the list, or upload it")
        if path.is_dir():
            self._check_all(path, _below(path), what)
        elif path.is_file():
            self._check_all(path, _beside(path), what)
        else:
            raise OptionError(f"{what}: {self.shown(path)} is neither a file nor a folder")
        return path

    def writing(self, text: str, replace: bool, *, folder: bool = False) -> Path:
        """The place that may be written to: a .safetensors file, or a name without an ending for a folder.

        Raises:
            OptionError: it lies outside, has another ending, is there and not to be replaced, or is a folder that is
                there already (unless a `folder` to write into is asked for).
        """
        what = "Folder" if folder else "Write to"
        path = self._inside(text, what, self.roots)
        if not all(character.isprintable() for character in path.name):
            raise OptionError(f"{what}: a name may hold printable characters only, found {shown(path.name)}")
        if path.name.startswith("."):
            raise OptionError(f"{what}: names that begin with a dot are left alone, choose another")
        if path in self.roots and not folder:
            raise OptionError(f"{what}: this is a folder; name a file in it")
        if not path.parent.is_dir():
            raise OptionError(f"{what}: the folder {self.shown(path.parent)} does not exist; create it first")
        if path.is_dir() and not folder:
            raise OptionError(f"{what}: {self.shown(path)} is a folder, and folders are never replaced here")
        if path.suffix not in ("", TENSORS) and not folder:
            raise OptionError(f"{what}: expected a name that ends in {TENSORS}, found {shown(path.name)}")
        if os.path.lexists(path) and not path.is_dir() and (folder or not replace):
            advice = "choose another name" if folder else 'choose another name, or tick "Replace"'
            raise OptionError(f"{what}: {self.shown(path)} is there already; {advice}")
        return path

    @property
    def _readable(self) -> tuple[Path, ...]:
        return self.roots if self.uploads is None else (*self.roots, self.uploads)

    def _inside(self, text: str, what: str, allowed: Sequence[Path]) -> Path:
        """The real path of a text, if it lies in one of the folders."""
        if not isinstance(text, str) or not text.strip():
            raise OptionError(f"{what}: nothing was chosen; name a file")
        text = text.strip()
        if "\0" in text or len(text) > LONGEST_PATH:
            raise OptionError(f"{what}: this is no path: {shown(text, 80)}")
        if os.name == "posix" and _WINDOWS.search(text):
            raise OptionError(f"{what}: expected a path of this system, found {shown(text, 80)}")
        path = Path(os.path.realpath(self.roots[0] / text))  # an absolute path takes the place of what stands before it
        if not any(path == root or root in path.parents for root in allowed):
            names = ", ".join(str(root) for root in self.roots)
            raise OptionError(
                f"{what}: {shown(text)} leads outside of the folders that this page may use ({names}); "
                "copy the file there, or start with --folder for the one that it is in"
            )
        return path

    def _check_all(self, path: Path, others: Iterable[Path], what: str) -> None:
        """Refuse links that lead outside, among the files that are read together with `path`."""
        for count, other in enumerate(others):
            if count >= MOST_IN_FOLDER:
                raise OptionError(
                    f"{what}: {self.shown(path)} holds more than {MOST_IN_FOLDER:,} files; is it a model?"
                )
            real = Path(os.path.realpath(other))
            if not any(root in real.parents for root in self._readable):
                raise OptionError(f"{what}: {self.shown(other)} is a link that leads outside of the folders")

    # -- words ---------------------------------------------------------------------------------------------------------
    def shown(self, path: Path) -> str:
        """A path as the page calls it: below the first folder without that, an upload by its name."""
        if self.uploads is not None and self.uploads in path.parents:
            return path.name
        return str(path.relative_to(self.roots[0])) if self.roots[0] in path.parents else str(path)

    def upload(self, path: str) -> str:
        """The real path of an upload.

        Raises:
            OptionError: it is none.
        """
        return str(self._inside(path, "Upload", () if self.uploads is None else (self.uploads,)))

    def uploaded(self, path: str) -> str:
        """Put an upload on the list to pick from; its path.

        Raises:
            OptionError: it is none.
        """
        real = self.upload(path)
        self._uploaded[real] = f"{Path(real).name} (uploaded)"
        return real

    def listed(self) -> list[tuple[str, str]]:
        """What there is to pick from: (how it is shown, path), files of tensors, their indexes, and folders of PEFT."""
        found = [(label, path) for path, label in self._uploaded.items()]
        for root in self.roots:
            lead = "" if len(self.roots) == 1 else f"{root.name}/"
            for path, size in _files(root):
                label = f"{lead}{path.relative_to(root).as_posix()}"
                found.append((f"{label}  ·  {bytes_of(size)}" if size else label, str(path)))
                if len(found) >= MOST_FILES:
                    return found
        return found


def _files(root: Path) -> Iterator[tuple[Path, int]]:
    """Files of tensors with their bytes, and folders of adapters (0), but nothing hidden and nothing behind links."""
    visited = 0
    for base, folders, names in os.walk(root):
        here = Path(base)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if len(here.relative_to(root).parts) >= DEEPEST:
            folders.clear()
        if here != root and "adapter_config.json" in names:
            yield here, 0
        for name in sorted(names):
            file = here / name
            visited += 1
            if (
                name.endswith((TENSORS, INDEX))
                and not name.startswith(".")
                and file.is_file()
                and not file.is_symlink()
            ):
                yield file, file.stat().st_size
        if visited > MOST_VISITED:
            return


def _below(folder: Path) -> Iterator[Path]:
    for base, folders, names in os.walk(folder):
        for name in (*folders, *names):
            yield Path(base) / name


def _beside(file: Path) -> Iterator[Path]:
    """What is read together with a file: the settings of an adapter, the pieces that an index names."""
    if file.name.endswith(".json"):
        yield from file.parent.glob(f"*{TENSORS}")
    config = file.with_name("adapter_config.json")
    if config.exists():
        yield config
