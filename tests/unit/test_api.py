"""`save` and `load`: where model and file meet."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import nerine
from nerine import DoRA, FormatError, LoKr, LoRA, MergeError, OptionError, ShapeError

ALGORITHM = DoRA(LoKr(rank=1, alpha=2.0, factor=2))


def model_of() -> nn.ModuleDict:
    torch.manual_seed(5)
    return nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(4, 8), "c": nn.Conv1d(4, 6, 3)})


def output(model: nn.ModuleDict) -> torch.Tensor:
    x = torch.linspace(-1, 1, 30).reshape(5, 6)
    h = model["a"](x)
    return torch.cat([model["b"](h).flatten(), model["c"](h.T[None].expand(2, -1, -1)).flatten()])


def stirred(model: nn.Module, algorithm: Any = ALGORITHM, seed: int = 0, **options: Any) -> nerine.Network:
    network = nerine.attach(model, algorithm, **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return network


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "style.safetensors"
    nerine.save(stirred(model_of()), path)
    return path


@pytest.fixture
def want() -> torch.Tensor:
    model = model_of()
    stirred(model)
    return output(model).detach()


def test_load_into_a_plain_model(file: Path, want: torch.Tensor) -> None:
    model = model_of()
    network = nerine.load(model, file)
    assert torch.equal(output(model), want)
    assert len(network) == 3
    assert all(p.requires_grad for p in network.parameters())
    assert not any(p.requires_grad for n, p in model.named_parameters() if "nerine" not in n)
    network.detach()
    assert all(p.requires_grad for p in model.parameters())


def test_load_into_an_attached_network(file: Path, want: torch.Tensor) -> None:
    """To resume: the parameters an optimiser already holds are filled."""
    model = model_of()
    network = nerine.attach(model, ALGORITHM)
    before = [id(p) for p in network.parameters()]
    assert nerine.load(network, file, strict=True) is network
    assert [id(p) for p in network.parameters()] == before
    assert torch.equal(output(model), want)
    nerine.load(network, file)
    assert torch.equal(output(model), want), "loading twice is not loading once"


def test_load_again_under_the_same_name_is_refused(file: Path, want: torch.Tensor) -> None:
    model = model_of()
    nerine.load(model, file)
    with pytest.raises(OptionError, match="already has an adapter called 'default'"):
        nerine.load(model, file)
    assert torch.equal(output(model), want)


def test_resume_with_a_learned_scalar(tmp_path: Path) -> None:
    model = model_of()
    network = stirred(model, LoRA(rank=2, alpha=3.0, scalar=True))
    nerine.save(network, tmp_path / "a.safetensors")
    again = model_of()
    resumed = nerine.attach(again, LoRA(rank=2, alpha=3.0, scalar=True))
    nerine.load(resumed, tmp_path / "a.safetensors", strict=True)
    torch.testing.assert_close(output(again), output(model))
    assert all(t.item() == 1 for k, t in resumed.state_dict().items() if k.endswith("scalar"))
    nerine.load(resumed, tmp_path / "a.safetensors")
    torch.testing.assert_close(output(again), output(model))


def test_resume_takes_the_scale_of_the_file(file: Path, tmp_path: Path) -> None:
    """As with a file of alpha 16 in a network of alpha 1."""
    model = model_of()
    nerine.save(stirred(model, LoRA(rank=2, alpha=16.0)), tmp_path / "a.safetensors")
    again = model_of()
    nerine.load(nerine.attach(again, LoRA(rank=2, alpha=1.0)), tmp_path / "a.safetensors")
    torch.testing.assert_close(output(again), output(model))


@pytest.mark.parametrize(
    "algorithm",
    [
        LoRA(rank=2),
        LoKr(rank=1, alpha=2.0, factor=2),
        DoRA(LoKr(rank=1, alpha=2.0, factor=1)),
        DoRA(ALGORITHM.inner, axis="in"),
    ],
    ids=str,
)
def test_resuming_another_algorithm_is_refused(file: Path, algorithm: Any) -> None:
    network = stirred(model_of(), algorithm)
    before = {k: t.clone() for k, t in network.state_dict().items()}
    with pytest.raises(ShapeError, match="Attach with the settings of the file"):
        nerine.load(network, file)
    assert all(torch.equal(t, before[k]) for k, t in network.state_dict().items())


def test_missing_layers_are_reported_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nerine.save(stirred(model_of(), targets=["a", "b"]), tmp_path / "a.safetensors")
    small = nn.ModuleDict({"a": nn.Linear(6, 4)})
    with caplog.at_level(logging.WARNING, "nerine"):
        report = nerine.load(small, tmp_path / "a.safetensors").report
    assert report.missing == ("b",)
    assert len(report.unmatched) == 5
    assert "1 layers are missing" in caplog.text
    assert "missing: b" in str(report)
    assert report.to_dict()["missing"] == ("b",)
    fresh = nn.ModuleDict({"a": nn.Linear(6, 4)})
    with pytest.raises(FormatError, match="5 keys were not used and 1 layers are missing"):
        nerine.load(fresh, tmp_path / "a.safetensors", strict=True)
    assert list(fresh.state_dict()) == ["a.weight", "a.bias"]


def test_resuming_with_fewer_layers_in_the_file(tmp_path: Path) -> None:
    nerine.save(stirred(model_of(), targets=["a", "b"]), tmp_path / "a.safetensors")
    network = nerine.attach(model_of(), ALGORITHM)
    assert nerine.load(network, tmp_path / "a.safetensors").report.missing == ("c",)
    with pytest.raises(FormatError, match="missing"):
        nerine.load(nerine.attach(model_of(), ALGORITHM), tmp_path / "a.safetensors", strict=True)


def test_strength_and_name_of_what_is_loaded(file: Path, want: torch.Tensor) -> None:
    model = model_of()
    base = output(model).detach()
    network = nerine.load(model, file, name="style", strength=0.5)
    assert (network.names, network.strength) == (("style",), 0.5)
    part = model["a"](torch.ones(6))
    network.strength = 0
    assert torch.equal(output(model), base)
    assert not torch.equal(part, model["a"](torch.ones(6)))


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), "1", None])
def test_a_strength_that_is_no_number(file: Path, strength: Any) -> None:
    with pytest.raises(OptionError):
        nerine.load(model_of(), file, strength=strength)


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    network = stirred(model_of())
    report = nerine.save(network, tmp_path / "a.safetensors", metadata={"author": "me"})
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as handle:
        metadata = handle.metadata()
    own = json.loads(metadata["nerine"])
    assert own == {
        "semantics": 1,
        "version": nerine.__version__,
        "dialect": "lycoris",
        "algorithms": [ALGORITHM.settings()],
        "layers": {"a": 0, "b": 0, "c": 0},
    }
    assert metadata["author"] == "me"
    assert (report.layers, report.tensors, report.bytes) == (3, 15, (tmp_path / "a.safetensors").stat().st_size)
    assert "3 layers, 15 tensors" in str(report)
    assert report.to_dict()["dialect"] == "lycoris"


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        nerine.save(stirred(model_of()), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dialect": "lycoriss"}, r"no dialect is called 'lycoriss'\. Did you mean 'lycoris'"),
        ({"dtype": torch.int8}, "dtype must be"),
        ({"dtype": "bf16"}, "dtype must be"),
        ({"metadata": {"nerine": "x"}}, "metadata is text to text"),
        ({"metadata": {"format": "x"}}, "metadata is text to text"),
        ({"metadata": {"a": 1}}, "metadata is text to text"),
        ({"metadata": {1: "a"}}, "metadata is text to text"),
    ],
    ids=str,
)
def test_bad_options_of_save(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        nerine.save(stirred(model_of()), tmp_path / "a.safetensors", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"dropout": 1.0}, {"rank_dropout": -1}, {"name": "a.b"}, {"name": ""}], ids=str)
def test_bad_options_of_load(file: Path, options: dict[str, Any]) -> None:
    model = model_of()
    with pytest.raises(OptionError):
        nerine.load(model, file, **options)
    assert list(model.state_dict()) == list(model_of().state_dict())


def test_load_takes_a_model() -> None:
    with pytest.raises(OptionError, match=r"load: expected a torch\.nn\.Module, a Network or a pipeline .*, got str"):
        nerine.load("a.safetensors", "b.safetensors")  # type: ignore[arg-type]


def test_a_file_holds_one_adapter(tmp_path: Path, file: Path) -> None:
    model = model_of()
    stirred(model, name="x")
    stirred(model, name="y")
    both = nerine.Network.of(model)
    with pytest.raises(OptionError, match="a file holds one adapter: save one of x, y"):
        nerine.save(both, tmp_path / "a.safetensors")
    with pytest.raises(OptionError, match="a file holds one adapter: load into one of x, y"):
        nerine.load(both, file)
    nerine.save(both["y"], tmp_path / "a.safetensors")


def test_saved_while_merged_is_the_same_file(tmp_path: Path, file: Path) -> None:
    network = stirred(model_of())
    network.merge()
    nerine.save(network, tmp_path / "merged.safetensors")
    assert (tmp_path / "merged.safetensors").read_bytes() == file.read_bytes()


def test_resuming_while_merged_is_refused(file: Path) -> None:
    network = stirred(model_of())
    network.merge()
    with pytest.raises(MergeError, match="unmerge first"):
        nerine.load(network, file)


def test_what_the_file_does_not_hold_is_noted(tmp_path: Path) -> None:
    network = stirred(model_of())
    network.strength = 0.5
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    notes = nerine.save(network, tmp_path / "a.safetensors").notes
    assert any(note.startswith("not finite: a.") for note in notes)
    assert any("strengths are not part of the file" in note for note in notes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loaded_tensors_are_fp32_whatever_the_base(file: Path, dtype: torch.dtype) -> None:
    model = model_of().to(dtype)
    network = nerine.load(model, file)
    assert all(p.dtype == torch.float32 for p in network.parameters())
    assert model["a"](torch.ones(2, 6, dtype=dtype)).dtype == dtype


def test_training_resumes_exactly(tmp_path: Path) -> None:
    """Three steps, save, resume, three more: as six in one go."""

    def step(model: nn.ModuleDict, network: nerine.Network, count: int) -> None:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(count):
            optimizer.zero_grad()
            output(model).square().mean().backward()
            optimizer.step()

    straight = model_of()
    whole = stirred(straight)
    step(straight, whole, 6)

    first = model_of()
    network = stirred(first)
    step(first, network, 3)
    nerine.save(network, tmp_path / "half.safetensors")
    second = model_of()
    resumed = nerine.load(second, tmp_path / "half.safetensors")
    step(second, resumed, 3)
    assert all(torch.equal(t, whole.state_dict()[k]) for k, t in resumed.state_dict().items())


def test_files_of_safetensors_itself_are_read(tmp_path: Path, file: Path, want: torch.Tensor) -> None:
    safetensors.torch.save_file(safetensors.torch.load_file(file), tmp_path / "again.safetensors")
    model = model_of()
    report = nerine.load(model, tmp_path / "again.safetensors", strict=True).report
    assert torch.equal(output(model), want)
    assert report.rows[0].algorithm == "DoRA(LoKr, axis='out')"
