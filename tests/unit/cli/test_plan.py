"""`nerine plan`: what it says is what attaching does, and wrong words are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner, Result

import nerine
from nerine import DoRA, LoHa, LoKr, LoRA
from nerine.cli.plan import plan
from nerine.errors import FormatError, NerineError, OptionError, TargetError
from nerine.files.store import write_file
from nerine.tools.planning import algorithm_of, plan_checkpoint

APP = typer.Typer(pretty_exceptions_enable=False)
APP.command()(plan)


def run(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "100", "TERM": "dumb"}).invoke(APP, [str(word) for word in words])


def refused(*words: object) -> NerineError:
    done = run(*words)
    assert isinstance(done.exception, NerineError), done.output
    return done.exception


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width)
        self.ff = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Model(nn.Module):
    """Three blocks alike, a wider one, and a convolution before them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 12, 3)
        self.blocks = nn.ModuleList([Attention(12), Attention(12), Attention(12), Attention(20)])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    file = tmp_path / "base.safetensors"
    write_file(file, {name: t.detach().half() for name, t in Model().state_dict().items()}, {})
    return file


# -- what is planned ---------------------------------------------------------------------------------------------------
def test_it_is_what_attaching_does(base: Path) -> None:
    words = ("--algo", "lokr", "--rank", 2, "--set", "factor=4", "--dora", "--targets", "attn-only", "--json")
    done = run(base, *words)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    network = nerine.attach(Model(), DoRA(LoKr(rank=2, factor=4)), targets="attn-only")
    assert {row["layer"] for row in report["layers"]} == {path for path, *_ in network.located()}
    assert report["params"] == sum(p.numel() for p in network.parameters())
    assert report["base_params"] == sum(p.numel() for p in Model().parameters())
    assert report["share"] == pytest.approx(report["params"] / report["base_params"])
    assert report["training_bytes"] == {
        "values": 4 * report["params"],
        "gradients": 4 * report["params"],
        "optimizer": 8 * report["params"],
        "all": 16 * report["params"],
    }


@pytest.mark.parametrize("algorithm", [LoRA(rank=3, alpha=1), DoRA(LoHa(rank=2))], ids=str)
def test_the_size_of_the_file_is_that_of_its_tensors(base: Path, tmp_path: Path, algorithm: nerine.LoRA) -> None:
    planned = plan_checkpoint(base, algorithm, targets="attn-only")
    network = nerine.attach(Model(), algorithm, targets="attn-only")
    size = nerine.save(network, tmp_path / "a.safetensors", dtype=torch.float16).bytes
    header = int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little") + 8
    alphas = 4 * len(planned.plan.rows)
    assert planned.file_bytes == size - header - alphas


def test_blocks_that_are_alike_are_one_line(base: Path) -> None:
    done = run(base, "--rank", 4, "--targets", "attn-only", "--targets", "conv_in")
    assert done.exit_code == 0, done.output
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()[2:5]}
    assert rows.keys() == {"conv_in", "blocks.[0-2]", "blocks.3"}
    assert (rows["blocks.[0-2]"][1], rows["blocks.3"][1]) == ("12", "4")
    assert rows["blocks.[0-2]"][-1] == f"{12 * 4 * 24:,}"
    assert "17 layers, " in done.stdout
    assert "AdamW" in done.stdout


def test_every_layer(base: Path) -> None:
    done = run(base, "--targets", "blocks.3", "--layers")
    assert done.exit_code == 0, done.output
    assert "blocks.3.to_q" in done.stdout
    assert "20x20" in done.stdout


def test_patterns_that_leave_out(base: Path) -> None:
    report = json.loads(run(base, "--targets", "attn-only", "--targets", "!blocks.[1-3]", "--json").stdout)
    assert {row["layer"] for row in report["layers"]} == {f"blocks.0.{n}" for n in ("to_q", "to_k", "to_v", "to_out")}


def test_norms(base: Path) -> None:
    report = json.loads(run(base, "--targets", "attn-only", "--train-norm", "--json").stdout)
    assert {row["algorithm"] for row in report["layers"]} == {"LoRA(rank=16)", "Norm()"}
    assert sum(row["kind"] == "Norm" for row in report["layers"]) == 4


def test_rules_from_a_file(base: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text(
        '[[rule]]\nmatch = "to_q"\nalgorithm = "loha"\nrank = 2\n\n'
        '[[rule]]\nmatch = "ff"\nskip = true\n\n[[rule]]\nmatch = "blocks.3"\nalgorithm = "full"\n',
        encoding="utf-8",
    )
    done = run(base, "--rules", rules, "--targets", "blocks")
    assert done.exit_code == 0, done.output
    assert "left out: 8 layers (first blocks.0.ff.0): skipped by a rule" in done.stdout
    assert "no rule matches" in done.stdout
    report = json.loads(run(base, "--rules", rules, "--targets", "blocks", "--json").stdout)
    assert {row["layer"]: row["algorithm"] for row in report["layers"]} == {
        **{f"blocks.{i}.to_q": "LoHa(rank=2)" for i in range(4)},
        **{f"blocks.3.{name}": "Full()" for name in ("to_k", "to_v", "to_out")},
    }


def test_a_pipeline_is_planned_part_by_part() -> None:
    pytest.importorskip("diffusers")
    from nerine.tiny import load_pipeline
    from nerine.tiny.load import MODEL

    done = run(MODEL, "--rank", 4, "--targets", "attn-only")
    assert done.exit_code == 0, done.output
    assert "unet.mid_block.attentions.0" in done.stdout
    assert "text_encoder.text_model.encoder.layers.[0-1]" in done.stdout
    live = nerine.plan(load_pipeline(), LoRA(rank=4), targets="attn-only")
    assert f"{len(live.rows)} layers, {live.params:,} trained values" in done.stdout


def test_packed_layers_are_told(tmp_path: Path) -> None:
    file = tmp_path / "nf4.safetensors"
    tensors = {"a.weight": torch.zeros(48, 1, dtype=torch.uint8), "a.weight.absmax": torch.ones(2)}
    write_file(file, {**tensors, "b.weight": torch.ones(8, 6)}, {})
    words = "1 layers (first a) are packed as uint8 and left out; give the checkpoint that they were made from"
    assert f"note: {words}" in run(file).stdout
    write_file(file, tensors, {})
    assert words in str(refused(file))


# -- what is refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--algo", "lokrr"), r"no algorithm is called 'lokrr'. Did you mean 'lokr'"),
        (("--algo", "lokr", "--set", "faktor=8"), r"LoKr has no setting 'faktor'. Did you mean 'factor'"),
        (("--set", "axis=in"), r"LoRA has no setting 'axis'"),
        (("--set", "rank"), r"--set: expected key=value, found 'rank'"),
        (("--set", "rank=four"), r"rank: expected a whole number, got 'four'"),
        (("--set", "rank=1.5"), r"rank: expected a whole number, got '1.5'"),
        (("--set", "tucker=maybe"), r"tucker: expected true or false, got 'maybe'"),
        (("--set", "alpha=big"), r"alpha: expected a number or none, got 'big'"),
        (("--rank", "0"), r"LoRA: rank must be a whole number of at least 1"),
        (("--set", "init=zeros"), r"LoRA: init must be one of"),
        (("--dora", "--set", "axis=sideways"), r"DoRA: axis must be one of 'out', 'in'"),
        (("--rules", "nowhere.toml"), r"nowhere\.toml: the rules cannot be read"),
        (("--targets", "mine.toml"), r"mine\.toml: the preset cannot be read"),
    ],
)
def test_wrong_words_are_named(base: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        raise refused(base, *words)


@pytest.mark.parametrize(
    "words",
    [
        ("--rules", "a.toml", "--algo", "lora"),
        ("--rules", "a.toml", "--rank", "4"),
        ("--rules", "a.toml", "--set", "rank=4"),
        ("--rules", "a.toml", "--dora"),
        ("--rank", "4", "--set", "rank=8"),
        ("--rank", "four"),
        ("--nothing",),
    ],
)
def test_wrong_usage_ends_with_2(base: Path, words: tuple[str, ...]) -> None:
    assert run(base, *words).exit_code == 2


def test_targets_that_choose_nothing(base: Path) -> None:
    with pytest.raises(TargetError, match=r"no layer of Checkpoint matches 'to_x'. Did you mean 'to_"):
        raise refused(base, "--targets", "to_x")
    with pytest.raises(TargetError, match="A checkpoint knows no classes but torch's own layers"):
        raise refused(base, "--targets", "type:Attention")
    assert run(base, "--targets", "type:Conv2d").exit_code == 0  # which are known


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="found nothing there"):
        raise refused(tmp_path / "no.safetensors")


# -- settings ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "settings", "dora", "want"),
    [
        ("lora", {}, False, LoRA()),
        ("lora", {"rank": "4", "alpha": "2.5", "tucker": "true"}, False, LoRA(rank=4, alpha=2.5, tucker=True)),
        ("lora", {"alpha": "None", "scalar": "0"}, False, LoRA()),
        ("lokr", {"factor": "-1", "full_matrix": "Yes"}, False, LoKr(full_matrix=True)),
        ("boft", {"stages": "none", "constraint": "1e-3"}, False, nerine.BOFT(constraint=1e-3)),
        ("tlora", {"init": "random", "power": "2"}, False, nerine.TLoRA(init="random", power=2.0)),
        ("lora", {"rank": "4", "axis": "in"}, True, DoRA(LoRA(rank=4), axis="in")),
        ("dora", {"rank": "4", "detach_norm": "on"}, False, DoRA(LoRA(rank=4), detach_norm=True)),
    ],
)
def test_settings_are_read_by_their_types(name: str, settings: dict[str, str], dora: bool, want: nerine.LoRA) -> None:
    found = algorithm_of(name, settings, dora)
    assert found == want
    assert found.settings() == want.settings()
    assert {key: type(value) for key, value in found.settings().items()} == {
        key: type(value) for key, value in want.settings().items()
    }
