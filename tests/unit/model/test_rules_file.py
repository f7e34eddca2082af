"""Rules from a TOML file: the same as in code, and every slip an error that says where."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

import nerine
from nerine import IA3, DoRA, LoKr, LoRA, OptionError, Rule
from nerine.model.rules_file import parse_rules, read_rules

TEXT = """
# a comment
[[rule]]
match = "mid"
skip = true

[[rule]]
match = ["up.[0-1]", "type:Conv2d"]
algorithm = "lokr"
rank = 2
alpha = 4
factor = 2
lr = 1e-4
strength = 0.5

[[rule]]
match = "up"
algorithm = "dora"
axis = "in"
inner = { algorithm = "lora", rank = 3, alpha = 1.5 }
rows = [0, 2]
"""
RULES = [
    Rule("mid", None),
    Rule("up.[0-1]", LoKr(rank=2, alpha=4, factor=2), lr=1e-4, strength=0.5),
    Rule("type:Conv2d", LoKr(rank=2, alpha=4, factor=2), lr=1e-4, strength=0.5),
    Rule("up", DoRA(LoRA(rank=3, alpha=1.5), axis="in"), rows=(0, 2)),
]


def model() -> nn.Module:
    up = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)])
    return nn.ModuleDict({"mid": nn.Linear(4, 6), "up": up, "out": nn.Conv2d(4, 6, 3)})


def test_the_rules() -> None:
    assert parse_rules(TEXT) == RULES


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_goes_where_rules_would(tmp_path: Path, kind: type) -> None:
    file = tmp_path / "rules.toml"
    file.write_text(TEXT)
    assert read_rules(file) == RULES
    assert str(nerine.plan(model(), kind(file))) == str(nerine.plan(model(), RULES))
    network = nerine.attach(model(), kind(file))
    adapters = {path: adapter for path, _, adapter in network.adapters()}
    assert list(adapters) == ["up.0", "up.1", "up.2[0:2]", "out"]
    assert (adapters["up.0"].lr, adapters["up.0"].strength) == (1e-4, 0.5)
    assert network.report.skipped == {"mid": "skipped by a rule"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"rules: expected at least one section \[\[rule\]\]"),
        ("[rule]\nmatch = 'a'", r"expected at least one section \[\[rule\]\]"),
        ("[[rules]]\nmatch = 'a'", "no setting is called 'rules'. Did you mean 'rule'"),
        ("[[rule]]\nmatch = ", "rules: not valid TOML"),
        ("[[rule]]\nalgorithm = 'lora'", 'line 1, rule 1: match says which layers are meant, as in match = "attn1"'),
        ("[[rule]]\nmatch = []\nskip = true", "match says which layers"),
        ("[[rule]]\nmatch = 5\nskip = true", "match must be a list of texts"),
        ("\n\n[[rule]]\nmatch = 'a'", r"line 3, rule 1 \(match 'a'\): algorithm is missing"),
        ("[[rule]]\nmatch = 'a'\nalgoritm = 'lora'", "'algoritm' is unknown. Did you mean 'algorithm'"),
        ("[[rule]]\nmatch = 'a'\nalgorithm = 'lorra'", "no algorithm is called 'lorra'. Did you mean .*'lora'"),
        ("[[rule]]\nmatch = 'a'\nalgorithm = 'lora'\nrnk = 4", "LoRA has no setting 'rnk'. Did you mean 'rank'"),
        ("[[rule]]\nmatch = 'a'\nalgorithm = 'lora'\nrank = '4'", "rank must be a whole number"),
        ("[[rule]]\nmatch = 'a'\nalgorithm = 'lora'\nlr = -1", "lr must be a number of at least 0"),
        ("[[rule]]\nmatch = 'a'\nalgorithm = 'lora'\nrows = [2, 1]", "rows must be"),
        ("[[rule]]\nmatch = '!a'\nalgorithm = 'lora'", "leaves out, which only targets can say"),
        ("[[rule]]\nmatch = 'a'\nskip = true\nrank = 4", "skip = true has no use for rank"),
        ("[[rule]]\nmatch = 'a'\nskip = 'yes'", "skip must be true or false, got 'yes'"),
        ("[[rule]]\nmatch = 'a'\nalgorithm = 5", "no algorithm is called '5'"),
        ("[[rule]]\nmatch = 'a'\nalgorithm = 'dora'\ninner = 'lora'", r"rule 1 \(match 'a'\): inner must be a table"),
        ("[[rule]]\nmatch = 'a'\nskip = true\n[[ rule ]]\nmatch = 'b'", r"line 4, rule 2 \(match 'b'\)"),
    ],
)
def test_a_slip_is_named_with_its_place(text: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        parse_rules(text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"none\.toml: the rules cannot be read"):
        nerine.plan(model(), tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(OptionError, match=r"bytes\.toml: the rules cannot be read"):
        nerine.plan(model(), str(tmp_path / "bytes.toml"))


def test_where_a_multi_line_text_hides_the_lines_only_the_number_is_said() -> None:
    text = "[[rule]]\nmatch = '''\n[[rule]]\n'''\nskip = 1"
    with pytest.raises(OptionError, match=r"^rules, rule 1 \(match "):
        parse_rules(text)


def test_ia3_in_a_file_is_scaled_where_the_preset_says() -> None:
    (rule,) = parse_rules("[[rule]]\nmatch = 'ia3'\nalgorithm = 'ia3'")
    assert rule == Rule("ia3", IA3())
