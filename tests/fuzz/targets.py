"""What is fed with damaged files. A target gets the path of a file; it may succeed or raise a `NerineError`."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import nerine
from fuzz.seeds import LAYERS, model, tokens
from nerine import LoRA
from nerine.files.store import open_file
from nerine.tools import convert


class Judge:
    """A model, and whether it is as it was."""

    def __init__(self) -> None:
        self.model = model()
        self.names = [name for name, _ in self.model.named_modules()]
        self.output = self.run()

    def run(self) -> Tensor:
        with torch.no_grad():
            y: Tensor = self.model(tokens())
        return y

    def check(self) -> None:
        """Raises AssertionError where the model differs from what it was at first."""
        assert [name for name, _ in self.model.named_modules()] == self.names, "the model has other modules than before"
        assert not any("forward" in m.__dict__ for m in self.model.modules()), "a layer is still intercepted"
        assert torch.equal(self.run(), self.output), "the model computes something else than before"


def printable(text: str) -> None:
    """Raises AssertionError where a text could do something to a terminal."""
    bad = {c for c in text if not c.isprintable() and c != "\n"}
    assert not bad, f"control characters in a message: {text[:300]!a}"


class Reading:
    """Open, and read every tensor."""

    def __call__(self, path: Path) -> None:
        with open_file(path) as source:
            for key in source.keys:
                tensor = source.read(key)
                assert (tuple(tensor.shape), tensor.dtype) == (source.shape(key), source.dtype(key))
                assert tensor.untyped_storage().nbytes() == source.nbytes(key)


class Loading:
    """Load onto a model and run it; whatever happened, the model is as before in the end."""

    def __init__(self) -> None:
        self.judge = Judge()

    def __call__(self, path: Path) -> None:
        try:
            network = nerine.load(self.judge.model, path)
            try:
                self.judge.run()
                printable(str(network.report))
            finally:
                network.detach()
        finally:
            self.judge.check()


class Resuming:
    """Load into adapters that are there already; after an error they have the numbers that they had."""

    def __init__(self) -> None:
        self.network = nerine.attach(model(), LoRA(rank=2), targets=LAYERS)
        self.before = [t.detach().clone() for t in self.network.parameters()]

    def __call__(self, path: Path) -> None:
        try:
            nerine.load(self.network, path)
        except BaseException:
            now = list(self.network.parameters())
            assert all(torch.equal(t, b) for t, b in zip(now, self.before, strict=True)), (
                "half of a file was taken over"
            )
            raise
        with torch.no_grad():
            for tensor, before in zip(self.network.parameters(), self.before, strict=True):
                tensor.copy_(before)


class Converting:
    """Convert without a model; the file that comes out is whole, or there is none."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, self.folder)

    def __call__(self, path: Path) -> None:
        target = self.folder / "b.safetensors"
        try:
            convert(path, target, dialect="kohya")
            with open_file(target) as source:
                for key in source.keys:
                    source.read(key)
        finally:
            left = {file.name for file in target.parent.iterdir()}
            assert left <= {target.name}, f"rubbish left behind: {left}"
            target.unlink(missing_ok=True)


TARGETS: dict[str, Callable[[], Callable[[Path], None]]] = {
    "read": Reading,
    "load": Loading,
    "resume": Resuming,
    "convert": Converting,
}
