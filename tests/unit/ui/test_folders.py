"""The folders of the web app: no text that a user can type leads out of them, for reading or for writing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nerine.errors import OptionError
from nerine.ui.folders import Folders


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """inside/ (given), outside/ (not), uploads/; links from inside to both sides."""
    for name in ("inside/sub", "outside", "uploads", "inside/peft", "inside/model"):
        (tmp_path / name).mkdir(parents=True)
    for name in (
        "inside/a.safetensors",
        "inside/sub/b.safetensors",
        "outside/secret.safetensors",
        "uploads/u.safetensors",
    ):
        (tmp_path / name).write_bytes(b"x" * 1500)
    (tmp_path / "inside/out.safetensors").symlink_to(tmp_path / "outside/secret.safetensors")
    (tmp_path / "inside/outdir").symlink_to(tmp_path / "outside")
    (tmp_path / "inside/good.safetensors").symlink_to(tmp_path / "inside/sub/b.safetensors")
    return tmp_path


@pytest.fixture
def folders(world: Path) -> Folders:
    return Folders([world / "inside"], world / "uploads")


def test_what_lies_inside_is_read_whatever_it_is_called(folders: Folders, world: Path) -> None:
    inside = world / "inside"
    assert folders.reading("a.safetensors") == inside / "a.safetensors"
    assert folders.reading(" sub/../a.safetensors ") == inside / "a.safetensors"
    assert folders.reading(str(inside / "sub/b.safetensors")) == inside / "sub/b.safetensors"
    assert folders.reading("good.safetensors") == inside / "sub/b.safetensors"
    assert folders.reading(str(world / "uploads/u.safetensors")) == world / "uploads/u.safetensors"


@pytest.mark.parametrize(
    "text",
    [
        "../outside/secret.safetensors",
        "sub/../../outside/secret.safetensors",
        "out.safetensors",
        "outdir/secret.safetensors",
        "/etc/passwd",
        "//etc/passwd",
        "/proc/self/environ",
        "..",
        "/",
        "sub/../..",
    ],
)
def test_what_leads_outside_is_refused(folders: Folders, text: str) -> None:
    with pytest.raises(OptionError, match="leads outside"):
        folders.reading(text)
    with pytest.raises(OptionError, match="leads outside"):
        folders.writing(text, True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "nothing was chosen"),
        ("   ", "nothing was chosen"),
        ("a\0b.safetensors", "no path"),
        ("a" * 5000, "no path"),
        ("C:\\Windows\\x.safetensors", "path of this system"),
        ("c:x.safetensors", "path of this system"),
        ("..\\..\\x.safetensors", "path of this system"),
        ("\\\\server\\share\\x.safetensors", "path of this system"),
        ("missing.safetensors", "there is no missing.safetensors"),
    ],
)
def test_what_is_no_path_is_refused(folders: Folders, text: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        folders.reading(text)


@pytest.mark.parametrize("value", [None, 3, ["a.safetensors"], {"path": "/etc/passwd"}])
def test_what_is_no_text_is_refused(folders: Folders, value: object) -> None:
    with pytest.raises(OptionError, match="nothing was chosen"):
        folders.reading(value)  # type: ignore[arg-type]


def test_a_pipe_is_not_waited_for(folders: Folders, world: Path) -> None:
    os.mkfifo(world / "inside/pipe.safetensors")
    with pytest.raises(OptionError, match="neither a file nor a folder"):
        folders.reading("pipe.safetensors")


def test_a_folder_with_a_link_to_the_outside_is_refused(folders: Folders, world: Path) -> None:
    (world / "inside/model/unet").mkdir()
    assert folders.reading("model") == world / "inside/model"
    (world / "inside/model/unet/config.json").symlink_to("/etc/passwd")
    with pytest.raises(OptionError, match="link that leads outside"):
        folders.reading("model")


def test_settings_and_pieces_beside_a_file_may_not_be_links_to_the_outside(folders: Folders, world: Path) -> None:
    peft = world / "inside/peft"
    (peft / "adapter_model.safetensors").write_bytes(b"x")
    (peft / "adapter_config.json").symlink_to(world / "outside/secret.safetensors")
    with pytest.raises(OptionError, match="link that leads outside"):
        folders.reading("peft/adapter_model.safetensors")
    model = world / "inside/model"
    (model / "m.safetensors.index.json").write_text("{}")
    assert folders.reading("model/m.safetensors.index.json")
    (model / "m-00001-of-00001.safetensors").symlink_to(world / "outside/secret.safetensors")
    with pytest.raises(OptionError, match="link that leads outside"):
        folders.reading("model/m.safetensors.index.json")


# -- writing -----------------------------------------------------------------------------------------------------------
def test_what_is_there_is_replaced_only_when_that_was_asked_for(folders: Folders, world: Path) -> None:
    assert folders.writing("new.safetensors", False) == world / "inside/new.safetensors"
    with pytest.raises(OptionError, match='there already; choose another name, or tick "Replace"'):
        folders.writing("a.safetensors", False)
    assert folders.writing("a.safetensors", True) == world / "inside/a.safetensors"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sub", "folders are never replaced"),
        (".", "name a file in it"),
        ("notes.txt", "ends in .safetensors"),
        ("x.safetensors.py", "ends in .safetensors"),
        (".bashrc", "begin with a dot"),
        (".hidden.safetensors", "begin with a dot"),
        ("nowhere/x.safetensors", "does not exist"),
        ("a\nb.safetensors", "printable"),
        ("a\u202eb.safetensors", "printable"),
    ],
)
def test_only_new_files_of_tensors_are_written(folders: Folders, text: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        folders.writing(text, True)


def test_uploads_are_not_written_to(folders: Folders, world: Path) -> None:
    with pytest.raises(OptionError, match="leads outside"):
        folders.writing(str(world / "uploads/u.safetensors"), True)


def test_a_dangling_link_to_the_outside_is_not_written_through(folders: Folders, world: Path) -> None:
    (world / "inside/dangling.safetensors").symlink_to(world / "outside/new.safetensors")
    with pytest.raises(OptionError, match="leads outside"):
        folders.writing("dangling.safetensors", True)


def test_a_folder_to_write_into_may_be_there(folders: Folders, world: Path) -> None:
    assert folders.writing("sub", False, folder=True) == world / "inside/sub"
    with pytest.raises(OptionError, match="there already"):
        folders.writing("a.safetensors", True, folder=True)


# -- the list ----------------------------------------------------------------------------------------------------------
def test_the_list_has_what_can_be_read_and_no_links_to_the_outside(folders: Folders, world: Path) -> None:
    (world / "inside/peft/adapter_config.json").write_text("{}")
    (world / "inside/.hidden").mkdir()
    (world / "inside/.hidden/c.safetensors").write_bytes(b"x")
    held = folders.uploaded(str(world / "uploads/u.safetensors"))
    labels = [label for label, _ in folders.listed()]
    assert labels == [
        "u.safetensors (uploaded)",
        "a.safetensors  ·  1.5 kB",
        "peft",
        "sub/b.safetensors  ·  1.5 kB",
    ]
    assert held == str(world / "uploads/u.safetensors")
    for _, path in folders.listed():
        assert folders.reading(path)


def test_nothing_but_uploads_is_taken_for_one(folders: Folders, world: Path) -> None:
    for text in (
        "/etc/passwd",
        str(world / "inside/a.safetensors"),
        str(world / "uploads/../outside/secret.safetensors"),
    ):
        with pytest.raises(OptionError, match="leads outside"):
            folders.uploaded(text)


def test_a_folder_that_is_none_is_told_at_the_start(world: Path) -> None:
    with pytest.raises(OptionError, match=r"--folder .*missing: expected a folder"):
        Folders([world / "missing"])
    with pytest.raises(OptionError, match="at least one folder"):
        Folders([])
