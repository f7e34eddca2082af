"""The configuration: every key there and back, and every mistake named."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from nerine.errors import OptionError
from nerine.train.config import example, parse_config, read, read_config, settings_of, to_toml
from nerine.train.settings import Subset, TrainSettings, keys

OTHER = {  # a value for every key that is not its default
    "base": "models/sd",
    "config": Path("c"),
    "download": True,
    "dtype": "bf16",
    "quantize": "nf4",
    "offload": "group",
    "device": "cpu",
    "mixed_precision": "bf16",
    "algo": "lokr",
    "rank": 7,
    "alpha": 3.5,
    "settings": {"factor": 8, "full_matrix": True},
    "targets": ("attn-only", "!mid"),
    "rules": Path("r.toml"),
    "start_from": Path("a.safetensors"),
    "text_encoder_lr": 2e-5,
    "data": (Path("p"), Path("q r")),
    "regularization": Path("reg"),
    "resolution": 768,
    "bucket_step": 32,
    "crop": "random",
    "caption_extension": ".caption",
    "caption": 'a "quoted" word',
    "prefix": "sks, ",
    "cache_latents": "memory",
    "cache_text": "off",
    "cache_folder": Path("cache"),
    "prediction": "v",
    "timesteps": "shifted",
    "weighting": "min-snr",
    "loss": "huber",
    "optimizer": "prodigy",
    "lr": 3e-4,
    "optimizer_args": {"weight_decay": 0.1, "betas": [0.9, 0.95]},
    "schedule": "constant",
    "steps": 77,
    "epochs": 3,
    "validation": Path("held"),
    "prompts": ("one", "two\nlines"),
    "guidance": 2.5,
    "negative": "blurry",
    "sample_width": 640,
    "sample_height": 512,
    "out": Path("out"),
    "name": "style",
    "dialect": "kohya",
    "save_dtype": "fp32",
    "trackers": ("tensorboard",),
    "project": "mine",
}


def other(name: str, default: object) -> object:
    if name in OTHER:
        return OTHER[name]
    if isinstance(default, bool):
        return not default
    assert isinstance(default, int | float), name
    return default + 1 if isinstance(default, int) else default + 0.25


def with_all_changed() -> TrainSettings:
    settings = TrainSettings(subsets=(Subset(folder=Path("dogs"), repeats=3, prefix="sks "), Subset(folder=Path("c"))))
    for section in fields(TrainSettings):
        if section.name != "subsets":
            own = getattr(settings, section.name)
            changed = {one.name: other(one.name, getattr(own, one.name)) for one in fields(own)}
            settings = replace(settings, **{section.name: replace(own, **changed)})
    return settings


def test_every_key_is_another_in_the_test_above() -> None:
    for one in keys():
        assert other(one.name, one.default) != one.default, one.name


def test_every_setting_survives_toml() -> None:
    written = to_toml(with_all_changed())
    given = parse_config(written, "config")
    assert len(given) == len(list(keys())) + 1  # and the subsets
    again = {one.name: given[one.name] for one in keys()}
    expected = with_all_changed()
    for one in keys():
        value = getattr(getattr(expected, one.section), one.name)
        if "Path" in one.kind and value is not None:
            value = tuple(v.absolute() for v in value) if isinstance(value, tuple) else value.absolute()
        if one.name == "base":
            value = str(Path(value).absolute())
        assert again[one.name] == value, one.name
    assert given["subset"][0] == Subset(folder=Path("dogs").absolute(), repeats=3, prefix="sks ")


def test_defaults_survive_toml(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(to_toml(settings_of({})))
    found = settings_of(read_config(file))
    assert replace(found, output=replace(found.output, out=Path("nerine-train"))) == TrainSettings()


def test_the_example_names_every_key_and_can_be_uncommented(tmp_path: Path) -> None:
    text = example()
    assert [m for m in re.findall(r"^# (\w+) = ", text, flags=re.M) if m in {k.name for k in keys()}][
        : len(list(keys()))
    ] == [one.name for one in keys()]
    assert parse_config(text, "example") == {name: {} for name in ()}
    own = re.sub(r"^# (\w+ = )", r"\1", text.split("# Folders")[0], flags=re.M)
    given = parse_config(own, "example")
    assert set(given) == {one.name for one in keys()}


def test_paths_are_meant_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "c.toml"
    file.write_text(
        '[base]\nbase = "sd"\n[data]\ndata = ["a", "/b"]\n[output]\nout = "run"\n[[subset]]\nfolder = "dog"\n'
    )
    found = settings_of(read_config(file))
    assert found.base.base == str(tmp_path / "sub" / "sd")
    assert found.data.data == (tmp_path / "sub" / "a", Path("/b"))
    assert found.output.out == tmp_path / "sub" / "run"
    assert found.subsets[0].folder == tmp_path / "sub" / "dog"


def test_tiny_is_no_path(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[base]\nbase = "tiny"\n')
    assert settings_of(read_config(file)).base.base == "tiny"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[dat]\nx = 1", "no section [dat]. Did you mean 'data'"),
        ("lr = 1e-4", "lr belongs into the section [optimizer]"),
        ("data = 'x'", "expected a section [data]"),
        ("[data]\nlr = 1e-4", "[data] has no 'lr'. It belongs into [optimizer]."),
        ("[optimizer]\nlearning_rate = 1", "[optimizer] has no 'learning_rate'"),
        ("[optimizer]\nbatchsize = 1", "Did you mean 'batch_size'"),
        ("[optimizer]\nlr = 'fast'", "lr: expected a number, found 'fast'"),
        ("[optimizer]\nlr = -1.0", "lr must be at least 0, got -1"),
        ("[optimizer]\nbatch_size = 2.5", "batch_size: expected a whole number"),
        ("[optimizer]\nbatch_size = true", "batch_size: expected a whole number, found True"),
        ("[data]\nflip = 1", "flip: expected true or false, found 1"),
        ("[data]\ncrop = 'middle'", "crop: there is no 'middle'. Known: center, random."),
        ("[data]\ndata = [1]", "data: expected a list of texts, found [1]"),
        ("[adapter]\nsettings = 'factor=8'", "settings: expected a table of settings"),
        ("[subset]\nfolder = 'x'", "expected sections [[subset]]"),
        ("[[subset]]\nrepeats = 2", "subset 1: expected a folder"),
        ("[[subset]]\nfolder = 'x'\nrepeat = 2", "[[subset]] has no 'repeat'. Did you mean 'repeats'"),
        ("[data", "not valid TOML"),
    ],
)
def test_a_mistake_is_named(text: str, words: str) -> None:
    with pytest.raises(OptionError) as error:
        parse_config(text, "config.toml")
    assert "config.toml" in str(error.value)
    assert words in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"missing\.toml: the configuration cannot be read"):
        read_config(tmp_path / "missing.toml")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"steps": 1, "epochs": 1}, "steps and epochs"),
        ({"rules": Path("r"), "rank": 4}, "a file of rules has the algorithms in it"),
        ({"min_timestep": 500, "max_timestep": 500}, "min_timestep must be below max_timestep"),
        ({"validation": Path("v"), "validation_share": 0.1}, "give one of them"),
        ({"validation_share": 1.0}, "validation_share must be below 1"),
        ({"ema": 1.0}, "ema must be below 1"),
    ],
)
def test_what_excludes_each_other_is_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=re.escape(words)):
        settings_of(given)


def test_texts_of_the_command_line_are_read_by_type() -> None:
    named = {one.name: one for one in keys()}
    assert read(named["lr"], "1e-4", "--lr") == 1e-4
    assert read(named["rank"], "8", "--rank") == 8
    assert read(named["flip"], "true", "--flip") is True
    assert read(named["prompts"], ["a", "b"], "--prompt") == ("a", "b")
    assert read(named["out"], "x/y", "--out") == Path("x/y")
    assert read(named["caption"], "7", "--caption") == "7"
    assert read(named["guidance"], 3, "--guidance") == 3.0
