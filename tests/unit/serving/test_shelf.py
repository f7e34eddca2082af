"""The shelf: who gets what in a batch, what is refused, and that nothing is left behind."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nerine
from nerine.errors import FormatError, OptionError, ShapeError, TargetError, UnsupportedBase
from nerine.files.folder import open_adapter
from nerine.files.reading import read_checkpoint
from nerine.model.targets import every_spot
from nerine.serving import Shelf, ShelfReport
from served_models import alone, write


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.second = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y


@pytest.fixture
def net() -> Net:
    torch.manual_seed(1)
    return Net().double().requires_grad_(False).eval()


@pytest.fixture
def files(net: Net, tmp_path: Path) -> dict[str, Path]:
    made = {
        "cat": nerine.LoRA(rank=2),
        "dog": nerine.LoRA(rank=3, alpha=1.5),
        "eel": nerine.DoRA(nerine.LoRA(rank=2)),
        "fox": nerine.LoKr(rank=1),
    }
    return {
        name: write(net, algorithm, tmp_path / f"{name}.safetensors", seed)
        for seed, (name, algorithm) in enumerate(made.items())
    }


@pytest.fixture
def shelf(net: Net, files: dict[str, Path]) -> Shelf:
    shelf = Shelf(net)
    for name, file in files.items():
        shelf.add(name, file)
    return shelf


def inputs(samples: int, *shape: int) -> Tensor:
    rng = torch.Generator().manual_seed(samples)
    return torch.randn(samples, *(shape or (6,)), dtype=torch.float64, generator=rng)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


# -- who gets what -----------------------------------------------------------------------------------------------
def test_use_is_for_everybody_until_another_is_used(net: Net, shelf: Shelf, files: dict[str, Path]) -> None:
    x = inputs(3)
    base = net(x)
    shelf.use("cat")
    close(net(x), alone(net, {files["cat"]: 1.0}, x))
    shelf.use({"dog": 0.5, "eel": -1.0, "fox": 0.0})
    close(net(x), alone(net, {files["dog"]: 0.5, files["eel"]: -1.0}, x))
    shelf.use(("fox", 0.25))
    close(net(x), alone(net, {files["fox"]: 0.25}, x))
    shelf.use(None)
    assert torch.equal(net(x), base)


def test_a_batch_ends_and_what_was_used_before_goes_on(net: Net, shelf: Shelf, files: dict[str, Path]) -> None:
    x = inputs(2)
    base = net(x)
    shelf.use("cat")
    before = net(x)
    with shelf.batch([None, "dog"]):
        y = net(x)
        with shelf.batch(["eel", None]):
            inner = net(x)
        assert torch.equal(net(x), y)
    assert torch.equal(y[0], base[0])
    assert torch.equal(inner[1], base[1])
    close(y[1:], alone(net, {files["dog"]: 1.0}, x[1:]))
    close(inner[:1], alone(net, {files["eel"]: 1.0}, x[:1]))
    assert torch.equal(net(x), before)
    with pytest.raises(KeyError), shelf.batch([None, None]):
        raise KeyError
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("names", [["cat", "dog", None], ["dog", "eel", "cat"], ["fox", None, "fox"]])
def test_repeat_says_in_which_order_samples_come_again(
    net: Net, shelf: Shelf, files: dict[str, Path], names: list[str | None]
) -> None:
    x = inputs(6, 5, 6)
    base = net(x)
    for repeat, order in (("tile", [*names, *names]), ("each", [n for n in names for _ in range(2)])):
        with shelf.batch(names, repeat=repeat):
            y = net(x)
        for i, name in enumerate(order):
            want = base[i : i + 1] if name is None else alone(net, {files[name]: 1.0}, x[i : i + 1])
            close(y[i : i + 1], want)


def test_one_entry_or_equal_entries_need_no_order(net: Net, shelf: Shelf, files: dict[str, Path]) -> None:
    x = inputs(4)
    want = alone(net, {files["cat"]: 1.0}, x)
    for entries in (["cat"], ["cat", "cat"]):
        with shelf.batch(entries):
            close(net(x), want)


@pytest.mark.parametrize(
    ("entries", "repeat", "shape", "words"),
    [
        (["cat", None], None, (4, 6), 'first: the batch has 2 entries and .* 2 times as many .*repeat="tile"'),
        (["cat", None, "dog"], None, (4, 6), r"first: the batch has 3 entries.*\(4, 6\): expected 3 .*found 4"),
        (["cat", None, "dog"], "tile", (2, 6), r"expected 3 samples in dimension 0 \(or a multiple\), found 2"),
        ([None, None, None], None, (2, 6), "expected 3 samples in dimension 0, found 2"),
        (["cat"], None, (6,), "found no such dimension"),
    ],
)
def test_a_batch_of_another_size_is_an_error(
    net: Net, shelf: Shelf, entries: list[str | None], repeat: str | None, shape: tuple[int, ...], words: str
) -> None:
    x = torch.ones(shape, dtype=torch.float64)
    with pytest.raises(ShapeError, match=words), shelf.batch(entries, repeat=repeat):
        net(x)
    assert net(x).shape[-1] == 4  # and the batch is over


def test_strengths(net: Net, files: dict[str, Path]) -> None:
    """A number is for entries that name none; numbers by pattern multiply whatever an entry says."""
    x = inputs(2)
    shelf = Shelf(net)
    shelf.add("cat", files["cat"], strength=0.5)
    shelf.add("parts", files["cat"], strength={"first": 0.5, "second": -2.0})
    with shelf.batch(["cat", ("cat", 3.0)]):
        y = net(x)
    close(y[:1], alone(net, {files["cat"]: 0.5}, x[:1]))
    close(y[1:], alone(net, {files["cat"]: 3.0}, x[1:]))
    with shelf.batch(["parts", ("parts", 3.0)]):
        y = net(x)
    for row, factor in ((0, 1.0), (1, 3.0)):
        model = copy.deepcopy(net)
        nerine.load(model, files["cat"], strength={"first": 0.5 * factor, "second": -2.0 * factor})
        close(y[row : row + 1], model(x[row : row + 1]))


def test_attached_adapters_go_on_beside(net: Net, shelf: Shelf, files: dict[str, Path]) -> None:
    x = inputs(2)
    network = nerine.load(net, files["fox"], strength=0.5)
    with shelf.batch(["cat", None]):
        y = net(x)
    shelf.detach()
    close(y[1:], net(x)[1:])
    nerine.load(net, files["cat"], name="second")
    close(y[:1], net(x)[:1])
    network.detach()


def test_detaching_a_network_leaves_the_shelf(net: Net, shelf: Shelf, files: dict[str, Path]) -> None:
    x = inputs(3)
    network = nerine.load(net, files["fox"])
    shelf.use("cat")
    network.detach()
    close(net(x), alone(net, {files["cat"]: 1.0}, x))


def test_a_changed_weight_changes_the_norms_of_dora(net: Net, shelf: Shelf, files: dict[str, Path]) -> None:
    x = inputs(3)
    shelf.add("again", files["eel"])
    rng = torch.Generator().manual_seed(9)
    with shelf.batch(["eel", "again", "cat"]):
        net(x)
        for change in ("in place", "other memory", "other parameter"):
            new = torch.randn(10, 6, dtype=torch.float64, generator=rng)
            if change == "in place":
                net.first.weight.copy_(new)
            elif change == "other memory":
                net.first.weight.data = new
            else:
                net.first.weight = nn.Parameter(new, requires_grad=False)
            y = net(x)
            close(y[:2], alone(net, {files["eel"]: 1.0}, x[:2]))
            close(y[2:], alone(net, {files["cat"]: 1.0}, x[2:]))


def test_gradients_flow_to_the_input_and_to_a_trained_base(net: Net, shelf: Shelf, files: dict[str, Path]) -> None:
    x = inputs(2)
    with torch.inference_mode(), shelf.batch(["eel", "cat"]):
        net(x)  # what is remembered from here must be of use to autograd
    net.requires_grad_(True)
    for name in ("eel", "fox"):
        want, got = x.clone().requires_grad_(), x.clone().requires_grad_()
        other = copy.deepcopy(net)
        nerine.load(other, files[name], freeze=False)
        other(want).square().sum().backward()
        with shelf.batch([name, name]):
            net(got).square().sum().backward()
        close(got.grad, want.grad)
        close(net.first.weight.grad, other.first.weight.grad)
        net.zero_grad()


def test_threads_have_batches_of_their_own(net: Net, shelf: Shelf) -> None:
    x = inputs(2)
    with shelf.batch(["cat", None]):
        want = net(x)
    found: list[Tensor] = []

    def other() -> None:
        with shelf.batch([None, "dog"]):
            found.append(net(x))

    with shelf.batch(["cat", None]):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert torch.equal(net(x), want)
    assert not torch.equal(found[0], want)


# -- what is refused ---------------------------------------------------------------------------------------------
def test_names(net: Net, shelf: Shelf, files: dict[str, Path]) -> None:
    assert shelf.names == ("cat", "dog", "eel", "fox")
    assert len(shelf) == 4
    assert "cat" in shelf
    for use in (shelf.use, shelf.remove, lambda name: shelf.batch([name]).__enter__()):
        with pytest.raises(TargetError, match=r"no adapter called 'cta'\. Did you mean 'cat'\?"):
            use("cta")
    with pytest.raises(OptionError, match="already has an adapter called 'cat'"):
        shelf.add("cat", files["cat"])
    with pytest.raises(OptionError, match="cannot be the name"):
        shelf.add("", files["cat"])


@pytest.mark.parametrize("wanted", [3, ("cat",), ("cat", "strong"), {"cat": float("nan")}, ["cat"], {1: 1.0}, True])
def test_an_entry_that_is_none(shelf: Shelf, wanted: object) -> None:
    with pytest.raises(OptionError, match=r"expected a name|strength must be"):
        shelf.use(wanted)
    with pytest.raises(OptionError, match=r"expected a name|strength must be"), shelf.batch([wanted]):
        pass


@pytest.mark.parametrize("entries", ["cat", [], {"cat": 1.0}, 5])
def test_a_batch_that_is_none(shelf: Shelf, entries: object) -> None:
    with pytest.raises(OptionError, match="one entry for each sample"), shelf.batch(entries):
        pass
    with pytest.raises(OptionError, match="repeat must be"), shelf.batch(["cat"], repeat="twice"):
        pass


@pytest.mark.parametrize("resident", [0, True, 2.5])
def test_a_shelf_without_room(net: Net, resident: object) -> None:
    with pytest.raises(OptionError, match="resident is how many"):
        Shelf(net, resident=resident)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        found: Tensor = self.attention(y, y, y)[0]
        return found


@pytest.mark.parametrize(
    ("algorithm", "targets", "words"),
    [
        (nerine.Norm(), "norm", "norm: Norm.* on a normalisation layer cannot differ"),
        (nerine.LoRA(rank=2), "attention", "attention.in_proj_weight: .*only its own module can compute with"),
        (
            [nerine.Rule("first", nerine.LoRA(rank=2), rows=(0, 4))],
            "first",
            r"first\[0:4\]: .*some rows of a layer",
        ),
    ],
)
def test_layers_that_cannot_differ_from_sample_to_sample(
    algorithm: object, targets: str, words: str, tmp_path: Path
) -> None:
    model = Odd().requires_grad_(False).eval()
    good = write(model, nerine.LoRA(rank=2), tmp_path / "good.safetensors", targets="first")
    bad = write(model, algorithm, tmp_path / "bad.safetensors", targets=targets)
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    shelf = Shelf(model)
    with pytest.raises(UnsupportedBase, match=words):
        shelf.add("bad", bad)
    assert len(shelf) == 0
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    shelf.add("good", good)
    x = torch.randn(2, 3, 6)
    with shelf.batch(["good", None]):
        assert not torch.equal(model(x)[0], model(x)[1])


def test_two_shelves_and_adapters_on_rows(net: Net, shelf: Shelf, files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="served by another shelf"):
        Shelf(net).add("cat", files["cat"])
    shelf.detach()
    nerine.attach(net, [nerine.Rule("first", nerine.LoRA(rank=2), rows=(0, 4))], targets="first")
    with pytest.raises(OptionError, match="overlap"):
        Shelf(net).add("cat", files["cat"])
    assert "_nerine_mounts" not in net.second.__dict__


def test_a_file_for_another_model(net: Net, files: dict[str, Path], tmp_path: Path) -> None:
    other = nn.Sequential(nn.Linear(6, 9))
    shelf = Shelf(other)
    with pytest.raises(FormatError):
        shelf.add("cat", files["cat"])
    only = write(net, nerine.LoRA(rank=2), tmp_path / "only.safetensors", targets="first")
    part = nn.ModuleDict({"first": nn.Linear(6, 10)})
    with pytest.raises(FormatError, match="keys were not used"):
        Shelf(part).add("cat", files["cat"], strict=True)
    assert len(Shelf(part).add("only", only, strict=True).rows) == 1


# -- what is left behind -----------------------------------------------------------------------------------------
def test_detach_and_remove_leave_nothing(net: Net, files: dict[str, Path], tmp_path: Path) -> None:
    x = inputs(2)
    base, before = net(x), {name: set(module.__dict__) for name, module in net.named_modules()}
    shelf = Shelf(net)
    shelf.add("cat", files["cat"])
    shelf.add("half", write(net, nerine.LoRA(rank=2), tmp_path / "half.safetensors", targets="second"))
    assert net.state_dict().keys() == Net().state_dict().keys()
    shelf.use("cat")
    with pytest.raises(OptionError, match="'cat' is in use"):
        shelf.remove("cat")
    shelf.use(None)
    shelf.remove("cat")
    assert set(net.first.__dict__) == before["first"]
    assert shelf.report().layers == 1
    shelf.use("half")
    assert not torch.equal(net(x), base)
    shelf.detach()
    assert {name: set(module.__dict__) for name, module in net.named_modules()} == before
    assert torch.equal(net(x), base)
    assert shelf.names == ()


def test_a_copy_of_the_model_is_not_served(net: Net, shelf: Shelf, files: dict[str, Path]) -> None:
    x = inputs(2)
    base = net(x)
    shelf.use("cat")
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), base)
    other = Shelf(twin)
    other.add("dog", files["dog"])
    other.use("dog")
    close(twin(x), alone(net, {files["dog"]: 1.0}, x))
    close(net(x), alone(net, {files["cat"]: 1.0}, x))


def test_what_a_batch_remembers_goes_with_it(net: Net, shelf: Shelf) -> None:
    with shelf.batch(["cat", "dog"]):
        net(inputs(2))
        routing = weakref.ref(shelf._traffic.now())
        assert routing().kept
    gc.collect()
    assert routing() is None


def test_a_transformer_layer_takes_no_shortcut_around_the_shelf(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).requires_grad_(False).eval()
    file = write(model, nerine.LoRA(rank=2), tmp_path / "one.safetensors", targets="linear1")
    x = torch.randn(2, 3, 8)
    shelf = Shelf(model)
    shelf.add("one", file)
    shelf.use("one")
    torch.testing.assert_close(model(x), alone(model, {file: 1.0}, x))
    assert not torch.allclose(model(x), nn.TransformerEncoderLayer.forward(copy.deepcopy(model), x))
    shelf.detach()
    assert "_nerine_fast_path" not in model.__dict__


# -- the rest ----------------------------------------------------------------------------------------------------
def test_a_checkpoint_is_as_good_as_a_file(net: Net, files: dict[str, Path]) -> None:
    x = inputs(2)
    shelf = Shelf(net)
    with open_adapter(files["eel"]) as source:
        checkpoint = read_checkpoint(source, {path: spot.site for path, spot in every_spot(net).items()})
        shelf.add("eel", checkpoint)
    shelf.use("eel")
    close(net(x), alone(net, {files["eel"]: 1.0}, x))
    with pytest.raises(FormatError, match="has no such layer"):
        Shelf(nn.Sequential(nn.Linear(6, 10))).add("eel", checkpoint)


def test_a_pipeline_is_a_model(net: Net, files: dict[str, Path]) -> None:
    class Pipe:
        def __init__(self) -> None:
            self.components = {"unet": net, "scheduler": None}

    x = inputs(2)
    shelf = Shelf(Pipe())
    shelf.add("cat", files["cat"])
    with shelf.batch([None, "cat"]):
        close(net(x)[1:], alone(net, {files["cat"]: 1.0}, x[1:]))


def test_the_report(net: Net, shelf: Shelf) -> None:
    shelf.use("eel")
    report = shelf.report()
    assert isinstance(report, ShelfReport)
    assert [row.name for row in report.rows if row.resident] == ["eel"]
    assert report.rows[0].values == 2 * (6 + 10) + 2 * (10 + 4)
    assert report.to_dict()["rows"][1]["algorithms"] == "LoRA(rank=3, alpha=1.5)"
    assert "DoRA(LoRA(rank=2))" in str(shelf)
    assert str(shelf).endswith("for 2 layers, 1 of at most 16 on the device")
    assert str(Shelf(nn.Sequential())) == "0 adapters (0 bytes) for 0 layers, 0 of at most 16 on the device"


def test_an_adapter_of_the_same_name_is_another_one(net: Net, files: dict[str, Path]) -> None:
    x = inputs(2)
    shelf = Shelf(net, resident=1)
    for name in ("cat", "fox", "cat"):
        shelf.add("one", files[name])
        shelf.use("one")
        close(net(x), alone(net, {files[name]: 1.0}, x))
        shelf.use(None)
        shelf.remove("one")
