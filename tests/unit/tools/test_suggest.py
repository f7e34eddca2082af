"""Suggestions: the numbers are those that an extraction finds, and what is printed can be run."""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import nerine
from checkpoint_pairs import low_rank, only, pair, tensors
from nerine.errors import FormatError, MissingExtra, OptionError
from nerine.tools.extract import extract
from nerine.tools.suggest import SuggestReport, suggest, svg, write_plot

SIZES = (30_000, 60_000, 300_000)
FP16 = torch.float16


def is_layer(name: str) -> bool:
    return name.endswith(".weight") and "norm" not in name and not name.endswith("_embedding.weight")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Changes of six ranks everywhere, and next to none in the first and the last convolution."""
    small, large = only(low_rank(rank=6, size=1e-4), "conv_in", "conv_out"), low_rank(rank=6, noise=1e-4)

    def change(name: str, t: Tensor) -> Tensor:
        return small(name, t) if "conv_in" in name or "conv_out" in name else large(name, t)

    return pair(tmp_path_factory.mktemp("plain"), change)


@pytest.fixture(scope="module")
def report(plain: tuple[Path, Path]) -> SuggestReport:
    return suggest(*plain, size=120_000, sizes=SIZES)


def curve(report: SuggestReport, name: str) -> dict[int, float | None]:
    own = next(curve for curve in report.curves if curve.name == name)
    return dict(zip(report.sizes, own.errors, strict=True))


@pytest.mark.parametrize("algorithm", ["lora", "auto", "lokr", "full"])
@pytest.mark.slow
def test_the_errors_are_those_that_an_extraction_of_that_size_has(
    plain: tuple[Path, Path], report: SuggestReport, tmp_path: Path, algorithm: str
) -> None:
    found = curve(report, algorithm)
    for size in (60_000, 300_000):
        real = extract(*plain, tmp_path / "a.safetensors", algorithm=algorithm, size=size, dtype=FP16, dry_run=True)
        assert found[size] == pytest.approx(real.error, rel=0.06)


def test_the_errors_of_one_rank_for_all_are_those_of_that_rank(
    plain: tuple[Path, Path], report: SuggestReport, tmp_path: Path
) -> None:
    own = next(curve for curve in report.curves if curve.name == "lora, one rank")
    text, error = own.at[report.sizes.index(300_000)], own.errors[report.sizes.index(300_000)]
    rank = int(text.removeprefix("LoRA(rank=").removesuffix(")"))
    real = extract(*plain, tmp_path / "a.safetensors", rank=rank, dtype=FP16, dry_run=True)
    assert error == pytest.approx(real.error, rel=0.02)
    assert real.size <= 300_000
    larger = extract(*plain, tmp_path / "a.safetensors", rank=rank + 1, dtype=FP16, dry_run=True)
    assert larger.size > 300_000 * 0.97  # what stands in the header of a layer is only estimated


def test_errors_fall_with_size_and_choosing_is_never_worse(report: SuggestReport) -> None:
    for own in report.curves:
        known = [error for error in own.errors if error is not None]
        assert known == sorted(known, reverse=True)
    auto = curve(report, "auto")
    for name in ("lora", "lokr", "ia3", "diag-oft", "full"):
        for size, error in curve(report, name).items():
            assert error is None or auto[size] <= error * (1 + 1e-9)


def test_shares_are_those_of_the_squared_change(plain: tuple[Path, Path], report: SuggestReport) -> None:
    before, after = tensors(plain[0]), tensors(plain[1])
    squares = {n: float((after[n] - before[n]).double().square().sum()) for n in before if is_layer(n)}
    total = sum(squares.values())
    assert report.layers == len(squares)
    assert sum(share.share for share in report.kinds) == pytest.approx(1)
    assert sum(share.layers for share in report.blocks) == report.layers
    (own,) = (share for share in report.kinds if share.name == "ff.net.2")
    want = sum(square for name, square in squares.items() if name.endswith("ff.net.2.weight"))
    assert own.share == pytest.approx(want / total, rel=1e-4)
    size = sum(float(before[n].square().sum()) for n in squares if n.endswith("ff.net.2.weight"))
    assert own.relative == pytest.approx(math.sqrt(want / size), rel=1e-4)
    assert own.layers == 4


def test_the_effective_rank_of_equal_directions_is_their_number(tmp_path: Path) -> None:
    def change(name: str, t: Tensor) -> Tensor:
        if not is_layer(f"{name}"):
            return torch.zeros_like(t)
        side = min(len(t), t[0].numel())
        generator = torch.Generator().manual_seed(len(name))
        q, _ = torch.linalg.qr(torch.randn(len(t), side, generator=generator))
        p, _ = torch.linalg.qr(torch.randn(t[0].numel(), side, generator=generator))
        return 0.01 * (q[:, :3] @ p[:, :3].mT).reshape(t.shape)

    report = suggest(*pair(tmp_path, change), sizes=SIZES)
    assert set(report.directions) == {"least", "25%", "median", "75%", "largest"}
    for value in report.directions.values():
        assert value == pytest.approx(3, abs=1e-2)


def test_kinds_that_carry_next_to_nothing_can_be_left_out(plain: tuple[Path, Path], report: SuggestReport) -> None:
    assert set(report.silent) == {"conv_in", "conv_out"}
    assert sum(report.silent.values()) < report.left_out
    assert set(report.advice.without) == {"conv_in", "conv_out"}
    every = suggest(*plain, sizes=SIZES, left_out=0.0)
    assert not every.silent
    assert "targets" not in every.advice.attach


def test_the_recommended_settings_can_be_attached(report: SuggestReport) -> None:
    from nerine.tiny import load_pipeline

    model = nn.ModuleDict({"unet": load_pipeline().unet})
    network = eval(report.advice.attach, {"nerine": nerine, "model": model})
    paths = [path for path, *_ in network.located()]
    assert len(paths) > 70
    assert not any("conv_in" in path or "conv_out" in path for path in paths)


def test_the_recommended_command_can_be_run(plain: tuple[Path, Path], report: SuggestReport, tmp_path: Path) -> None:
    import typer
    from typer.testing import CliRunner

    from nerine.cli.extract import extract as command

    program, name, *words = shlex.split(report.advice.command)
    assert (program, name) == ("nerine", "extract")
    words[words.index("-o") + 1] = str(tmp_path / "a.safetensors")
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert 100_000 < (tmp_path / "a.safetensors").stat().st_size <= report.advice.size


def test_a_change_that_is_a_kronecker_product_is_recommended_as_one(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def change(name: str, t: Tensor) -> Tensor:
        if t.dim() != 2 or t.shape[0] % 8 or t.shape[1] % 8:
            return torch.zeros_like(t)
        a = torch.randn(8, 8, generator=generator)
        return 0.01 * torch.kron(a, torch.randn(len(t) // 8, t.shape[1] // 8, generator=generator))

    files = pair(tmp_path, only(change, "attn", "mlp", "ff"))
    report = suggest(*files, size=80_000, sizes=[40_000])
    assert report.advice.algorithm == "LoKr(full_matrix=True, factor=8)"
    assert report.advice.attach.startswith("nerine.attach(model, nerine.LoKr(full_matrix=True, factor=8)")
    assert report.advice.spread == "lokr"
    assert "--algo lokr --size 0.08MB" in report.advice.command
    assert report.advice.error < 0.01 < curve(report, "lora")[80_000]  # type: ignore[operator]
    assert any("LoKr(full_matrix=True, factor=8) leaves" in reason for reason in report.advice.reasons)


def test_without_a_size_it_is_the_least_that_keeps_nine_tenths(plain: tuple[Path, Path], report: SuggestReport) -> None:
    auto = curve(report, "auto")
    assert 1 - auto[60_000] ** 2 < 0.9 < 1 - auto[300_000] ** 2  # type: ignore[operator]
    assert suggest(*plain, sizes=SIZES).advice.size == 300_000
    assert suggest(*plain, sizes=SIZES[:2]).advice.size == 60_000
    assert report.advice.size == 120_000


def test_an_adapter_alone_and_on_its_base(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = plain
    file = tmp_path / "a.safetensors"
    made = extract(*plain, file, rank=4)
    alone = suggest(None, adapter=file, sizes=SIZES)
    beside = suggest(base, adapter=file, sizes=SIZES)
    assert alone.layers == beside.layers == made.layers
    assert (alone.relative, alone.base) == (None, "")
    assert beside.relative == pytest.approx(made.relative, rel=0.05)
    for size in SIZES:
        assert curve(alone, "lora")[size] == pytest.approx(curve(beside, "lora")[size], rel=0.02)
    assert [own.name for own in alone.curves] == ["auto", "lora", "lokr", "full", "lora, one rank"]
    assert max(alone.directions.values()) <= 4
    assert alone.advice.command.startswith(f"nerine resize {file} -o adapter.safetensors --size 0.3MB")


def test_a_rotation_needs_its_base(plain: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    extract(*plain, file, algorithm="diag-oft")
    with pytest.raises(FormatError, match="give the base with --base"):
        suggest(None, adapter=file, sizes=SIZES)
    assert suggest(plain[0], adapter=file, sizes=SIZES).layers > 80


def test_the_report_fits_into_a_terminal_and_into_json(report: SuggestReport) -> None:
    lines = str(report).splitlines()
    assert all(len(line) <= 80 for line in lines if not line.startswith("nerine"))
    assert "0.12 MB" in str(report)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["advice"]["command"] == report.advice.command
    assert data["sizes"] == [30_000, 60_000, 120_000, 300_000]


def test_the_plot_is_a_picture_with_a_line_for_each_algorithm(report: SuggestReport, tmp_path: Path) -> None:
    write_plot(report, tmp_path / "p.svg")
    root = ElementTree.fromstring((tmp_path / "p.svg").read_text())
    space = "{http://www.w3.org/2000/svg}"
    lines = [line.find(f"{space}title").text for line in root.iter(f"{space}polyline")]  # type: ignore[union-attr]
    assert lines == [own.name for own in report.curves if any(error is not None for error in own.errors)]
    assert "prefers-color-scheme: dark" in svg(report)
    points = next(root.iter(f"{space}polyline")).attrib["points"].split()
    places = [float(point.split(",")[1]) for point in points]
    assert places == sorted(places)  # downwards: the error falls
    with pytest.raises(OptionError, match=r"expected a picture called \.svg"):
        write_plot(report, tmp_path / "p.txt")


def test_other_pictures_need_matplotlib(report: SuggestReport, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(MissingExtra, match=r"nerine\[plots\]"):
        write_plot(report, tmp_path / "p.png")
    assert not (tmp_path / "p.png").exists()


def test_with_matplotlib_it_draws_them(report: SuggestReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (extra: plots)")
    write_plot(report, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"algos": ["lora", "boft"]}, "'boft' is not weighed"),
        ({"algos": []}, "algos names none"),
        ({"sizes": [0]}, "sizes are bytes above 0"),
        ({"left_out": 1.0}, "left_out is a share"),
        ({"dialect": "kohia"}, "no dialect is called 'kohia'"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(plain: tuple[Path, Path], options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        suggest(*plain, **{"sizes": SIZES, **options})


def test_what_is_to_be_looked_at_must_be_told(plain: tuple[Path, Path], tmp_path: Path) -> None:
    for files in ((plain[0],), (None, plain[1]), (*plain, plain[0]), (None,)):
        with pytest.raises(OptionError, match="give base and tuned, or an adapter"):
            suggest(*files)
    with pytest.raises(FormatError, match="nothing has changed"):
        suggest(plain[0], plain[0])
    save_file(
        {"x.lora_down.weight": torch.randn(2, 4), "x.lora_up.weight": torch.randn(6, 2)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(OptionError, match="give the base of the adapter"):
        suggest(None, adapter=tmp_path / "a.safetensors", algos=["ia3"])
