"""nerine.kohya as sd-scripts drives it: the calls of its trainer and of gen_img.py, for every algorithm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from nerine import kohya
from nerine.errors import OptionError, ShapeError, TargetError
from sd_scripts import stand_in
from sd_scripts.stand_in import Options, generate, output, train

pytest.importorskip("diffusers")

ALGORITHMS = ("lora", "locon", "loha", "lokr", "dylora", "glora", "full", "diag-oft", "boft", "ia3", "tlora")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"args": ["dora_wd=True"]},
    "train_norm": {"args": ["train_norm=True"]},
    "dropout": {"args": ["rank_dropout=0.2", "module_dropout=0.1"], "network_dropout": 0.2},
    "scale_weight_norms": {"scale_weight_norms": 0.05},
    "full_bf16": {"full_bf16": True},
}


def args_for(algo: str, more: list[str]) -> list[str]:
    own = {
        "dylora": ["block_size=2"],
        "diag-oft": ["constraint=0.5"],
        "boft": ["constraint=0.5", "rescaled=True"],
        "ia3": ["preset=ia3"],
        "lokr": ["factor=4"],
    }
    return [f"algo={algo}", *own.get(algo, []), *more]


def options(algo: str, variant: str = "plain", **more: Any) -> Options:
    given = {**VARIANTS[variant], **more}
    return Options(network_args=args_for(algo, [*given.pop("args", []), *given.pop("extra", [])]), **given)


def rounded(variant: str) -> tuple[Any, Any]:
    """The base as the trainer leaves it, in fp32."""
    encoder, denoiser = stand_in.text_encoder(), stand_in.unet()
    if variant == "full_bf16":
        encoder.bfloat16(), denoiser.bfloat16()
    return encoder.float().eval(), denoiser.float().eval()


# Each algorithm alone and each variant once; the other pairs are slow tests.
QUICK = {*((algo, "plain") for algo in ALGORITHMS), *(("lokr", variant) for variant in VARIANTS), ("loha", "dora")}


def pairs() -> list[Any]:
    every = [(algo, variant) for algo in ALGORITHMS for variant in VARIANTS]
    return [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in every]


@pytest.mark.parametrize(("algo", "variant"), pairs())
def test_trained_is_saved_is_resumed_is_merged(tmp_path: Path, algo: str, variant: str) -> None:
    file = tmp_path / "style.safetensors"
    encoder, denoiser = stand_in.text_encoder(), stand_in.unet()
    found = train(encoder, denoiser, options(algo, variant), file)
    found.network.float()
    trained = output(encoder.float(), denoiser.float())
    base = output(*rounded(variant))
    assert (trained - base).norm() > 1e-3 * base.norm()

    same = {"rtol": 0, "atol": 2e-5 * float(trained.abs().max())}
    encoder, denoiser = rounded(variant)
    again = train(encoder, denoiser, options(algo, variant, network_weights=file, steps=0, full_bf16=False))
    torch.testing.assert_close(output(encoder, denoiser), trained, **same)
    assert again.network.report.unmatched == {}
    assert again.network.report.missing == ()

    encoder, denoiser = rounded(variant)
    train(encoder, denoiser, Options(network_weights=file, dim_from_weights=True, steps=0))
    torch.testing.assert_close(output(encoder, denoiser), trained, **same)

    encoder, denoiser = rounded(variant)
    onto = options(algo, variant, base_weights=[file], base_weights_multiplier=[1.0], steps=0, full_bf16=False)
    train(encoder, denoiser, onto)
    torch.testing.assert_close(output(encoder, denoiser), trained, **same)

    for ways in ({}, {"merge": True}, {"beforehand": True}):
        encoder, denoiser = rounded(variant)
        generate(encoder, denoiser, {file: 1.0}, **ways)
        torch.testing.assert_close(output(encoder, denoiser), trained, **same)


def test_the_file_has_sd_scripts_names_and_hashes(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    train(stand_in.text_encoder(), stand_in.unet(), options("lora"), file)
    with safe_open(file, "pt") as opened:
        keys, about = list(opened.keys()), opened.metadata()
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in keys
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight" in keys
    assert "lora_unet_conv_in.alpha" in keys
    assert all(key.startswith(("lora_unet_", "lora_te_text_model_")) for key in keys)
    assert about["ss_network_module"] == "nerine.kohya"
    assert len(about["sshs_model_hash"]) == 64
    assert "sshs_legacy_hash" in about


@pytest.mark.parametrize(
    ("encoders", "prefixes"),
    [
        (["clip"], {"lora_te"}),
        (["clip", "clip"], {"lora_te1", "lora_te2"}),
        (["clip", None], {"lora_te1"}),
        (["clip", "t5"], {"lora_te1", "lora_te3"}),
        (["clip", "clip", "t5"], {"lora_te1", "lora_te2", "lora_te3"}),
    ],
)
def test_text_encoders_bear_their_numbers_in_files(tmp_path: Path, encoders: list[Any], prefixes: set[str]) -> None:
    from transformers import T5Config, T5EncoderModel

    t5 = T5Config(d_model=12, d_kv=4, d_ff=20, num_layers=2, num_heads=3, vocab_size=50)
    makers: dict[Any, Any] = {"clip": stand_in.text_encoder, "t5": lambda: T5EncoderModel(t5), None: lambda: None}

    def models() -> list[Any]:
        return [makers[name]() for name in encoders]

    file, own = tmp_path / "x.safetensors", models()
    network = kohya.create_network(1.0, 4, 2.0, None, own, stand_in.unet(), train_t5xxl="True")
    network.apply_to(own, None)
    assert {lora.lora_name.split("_")[1] for lora in network.text_encoder_loras} == {p[5:] for p in prefixes}
    network.save_weights(file, None, {})
    with safe_open(file, "pt") as opened:
        stems = {key.split(".")[0] for key in opened.keys()}  # noqa: SIM118
    assert {"_".join(stem.split("_")[:2]) for stem in stems} == {*prefixes, "lora_unet"}
    fresh = models()
    again, _tensors = kohya.create_network_from_weights(
        1.0, str(file), None, fresh, stand_in.unet(), for_inference=True
    )
    assert again.report.unmatched == {}
    assert len(again.loras) == len(network.loras)


def test_freezing_and_casting_the_models_leaves_the_adapters_alone(tmp_path: Path) -> None:
    encoder, denoiser = stand_in.text_encoder(), stand_in.unet()
    network = kohya.create_network(1.0, 4, 2.0, None, encoder, denoiser, algo="lokr", dora_wd="True", factor="4")
    network.apply_to(encoder, denoiser, True, True)
    denoiser.requires_grad_(False)
    denoiser.to(torch.bfloat16)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in network.parameters())
    ours = {id(p) for p in network.parameters()}
    assert not any(id(p) in ours for p in denoiser.parameters())
    network.to(torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in network.parameters())
    network.float()
    assert all(p.dtype == torch.float32 for p in network.parameters())


def test_every_trained_tensor_is_in_one_group_and_learns() -> None:
    found = train(stand_in.text_encoder(), stand_in.unet(), options("lokr", "dora", steps=1))
    grouped = [p for group in found.groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(found.network.parameters()))
    names = dict(found.network.named_parameters())
    assert any(name.endswith("magnitude") for name in names)
    assert found.descriptions == ["textencoder", "unet"]


def test_rates_of_text_encoders_unet_blocks_rules_and_lora_plus() -> None:
    encoders = [stand_in.text_encoder(), stand_in.text_encoder(3)]
    network = kohya.create_network(1.0, 4, 2.0, None, encoders, stand_in.unet(), loraplus_unet_lr_ratio="4")
    network.apply_to(encoders, None, True, True)
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-3, 2e-3], 3e-3, 9.0)
    assert dict(zip(names, (g["lr"] for g in groups), strict=True)) == {
        "textencoder 1": 1e-3,
        "textencoder 2": 2e-3,
        "unet": 3e-3,
        "unet plus": 1.2e-2,
    }
    plus = {id(p) for g, n in zip(groups, names, strict=True) if n == "unet plus" for p in g["params"]}
    assert plus == {id(lora.adapter.up) for lora in network.unet_loras}
    groups, names = network.prepare_optimizer_params([5e-4], None, 7e-4)
    assert [g["lr"] for g in groups][:3] == [5e-4, 5e-4, 7e-4]
    groups, names = network.prepare_optimizer_params(0, 1e-3, 1e-3)
    assert names == ["unet", "unet plus"]
    with pytest.raises(OptionError, match="nothing would be trained"):
        network.prepare_optimizer_params(0, 0, 0)
    with pytest.raises(OptionError, match="2 rates, and text encoder 3 has none"):
        kohya.create_network(1.0, 4, 2.0, None, [*encoders, stand_in.text_encoder()], None).prepare_optimizer_params(
            [1e-3, 2e-3], None, 1e-3
        )


def test_blocks_have_ranks_alphas_and_rates_of_their_own() -> None:
    ranks = [2] * 25
    ranks[1], ranks[12] = 6, 3  # the first attention of the down blocks, the middle
    weights = ",".join(["1", "0.5", *["1"] * 10])  # block 0 has no layers
    given = {"block_dims": ",".join(map(str, ranks)), "down_lr_weight": weights, "mid_lr_weight": "0", "algo": "lora"}
    network = kohya.create_network(1.0, 4, 2.0, None, None, stand_in.unet(), **given)
    by_name = {lora.lora_name: lora for lora in network.loras}
    first = by_name["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"]
    assert first.lora_dim == 6
    assert not any("mid_block" in name for name in by_name)  # a rate of zero leaves it out
    assert not any(name.endswith("resnets_0_conv1") for name in by_name)  # block_dims are ranks of linear layers
    assert by_name["lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"].lora_dim == 2
    network.apply_to(None, None, True, True)
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-2, None)
    rates = dict(zip(names, (g["lr"] for g in groups), strict=True))
    assert rates["unet_block1"] == 5e-3
    assert rates["unet"] == 1e-2  # conv_in and the like are in no block


def test_patterns_set_ranks_rates_and_choice() -> None:
    network = kohya.create_network(
        1.0,
        4,
        2.0,
        None,
        stand_in.text_encoder(),
        stand_in.unet(),
        network_reg_dims="attn2=7,ff_net=0",
        network_reg_lrs="mid_block=0.5",
        exclude_patterns=r"['.*to_out.*']",
        include_patterns=r"['mid_block.*to_out.*']",
    )
    ranks = {lora.lora_name: lora.lora_dim for lora in network.loras}
    assert {rank for name, rank in ranks.items() if "attn2" in name} == {7}
    assert not any("ff_net" in name for name in ranks)
    assert {name for name in ranks if "to_out" in name} == {
        name for name in ranks if "mid" in name and "to_out" in name
    }
    network.apply_to(None, None, True, True)
    groups, names = network.prepare_optimizer_params(None, 1e-3, 1e-3)
    assert dict(zip(names, (g["lr"] for g in groups), strict=True))["unet reg_lr_0"] == 0.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"algoo": "lokr"}, "'algo'"),
        ({"algo": "lorka"}, "network_args: algo: .*lora"),
        ({"dora_wd": "maybe"}, "true or false"),
        ({"conv_dim": "four"}, "a number"),
        ({"preset": "fulll"}, "full"),
        ({"block_dims": "1,2,3"}, "25 values"),
        ({"train_blocks": "doubles"}, "double"),
        ({"down_lr_weight": "sin+0.1"}, "sine"),
        ({"train_double_block_indices": "3-1"}, "0-3,7"),
        ({"network_reg_dims": "attn"}, "key=8"),
        ({"network_reg_dims": "attn[=4"}, "regular expression"),
        ({"ggpo_beta": "0.01"}, "GGPO"),
        ({"algo": "dylora", "block_size": "3"}, "divisor"),
        ({"rank_dropout": "1.5"}, "rank_dropout"),
    ],
)
def test_bad_arguments_say_what_is_wrong(given: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        kohya.create_network(1.0, 4, 2.0, None, None, stand_in.unet(), **given)


@pytest.mark.parametrize("text", ["False", "0", "None", "", "no"])
def test_what_says_no_is_no(text: str) -> None:
    network = kohya.create_network(1.0, 4, 2.0, None, None, stand_in.unet(), dora_wd=text, use_scalar=text)
    assert {type(lora.adapter.algorithm).__name__ for lora in network.loras} == {"LoRA"}


def test_names_of_the_past_work_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    network = kohya.create_network(
        1.0, 4, 2.0, None, None, stand_in.unet(), algo="boft", constrain="0.5", use_cp="False"
    )
    assert network.loras[0].adapter.algorithm.constraint == 0.5
    assert "constraint" in caplog.text


def test_dropout_comes_from_either_name() -> None:
    for given in ({"dropout": None, "neuron_dropout": 0.25}, {"dropout": "0.25"}):
        network = kohya.create_network(1.0, 4, 2.0, None, None, stand_in.unet(), **given)
        assert network.loras[0].adapter.noise.dropout == 0.25


def test_weights_of_another_algorithm_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    train(stand_in.text_encoder(), stand_in.unet(), options("loha", steps=1), file)
    with pytest.raises(ShapeError, match="LoHa"):
        train(stand_in.text_encoder(), stand_in.unet(), options("lora", network_weights=file, steps=0))


def test_a_part_that_is_not_trained_has_no_adapters(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    encoder = stand_in.text_encoder()
    found = train(encoder, stand_in.unet(), options("lora", train_text_encoder=False, steps=1), file)
    assert found.network.text_encoder_loras == []
    assert not any("lora_te" in name for name in found.network.state_dict())
    assert type(encoder).forward == encoder.forward.__func__
    with pytest.raises(TargetError, match="nothing to train"):
        train(encoder, stand_in.unet(), options("lora", train_text_encoder=False, train_unet=False, steps=0))


def test_multipliers_stack_and_zero_is_the_base(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    train(stand_in.text_encoder(), stand_in.unet(), options("lokr", "dora"), one)
    train(stand_in.text_encoder(), stand_in.unet(), options("diag-oft"), two)
    encoder, denoiser = rounded("plain")
    base = output(encoder, denoiser)
    networks = generate(encoder, denoiser, {one: 0.5, two: 0.7})
    both = output(encoder, denoiser)
    for network in networks:
        network.set_multiplier(0.0)
    assert torch.equal(output(encoder, denoiser), base)
    networks[0].set_multiplier(0.5)
    alone = output(encoder, denoiser)
    assert (both - alone).norm() > 1e-3 * base.norm()
    networks[0].restore()
    networks[1].restore()
    assert torch.equal(output(encoder, denoiser), base)


def test_the_timesteps_of_the_unet_reach_tlora() -> None:
    encoder, denoiser = stand_in.text_encoder(), stand_in.unet()
    network = kohya.create_network(1.0, 4, 2.0, None, encoder, denoiser, algo="tlora")
    network.apply_to(encoder, denoiser)
    denoiser(torch.randn(1, 4, 8, 8), timestep=torch.tensor([750]), encoder_hidden_states=torch.randn(1, 8, 12))
    assert network.context.timestep.tolist() == [750.0]
    denoiser(torch.randn(1, 4, 8, 8), 0.25, torch.randn(1, 8, 12))
    assert float(network.context.timestep) == 250.0


def test_state_dict_goes_through_accelerate_and_back(tmp_path: Path) -> None:
    encoder, denoiser = stand_in.text_encoder(), stand_in.unet()
    found = train(encoder, denoiser, options("loha", "dora"))
    state = {key: value.clone() for key, value in found.network.state_dict().items()}
    assert all("adapter" not in key for key in state)
    wrapped = torch.nn.ModuleDict({"module": found.network})  # as DistributedDataParallel has it
    assert {key.removeprefix("module.") for key in wrapped.state_dict()} == set(state)
    fresh_encoder, fresh = stand_in.text_encoder(), stand_in.unet()
    network = kohya.create_network(1.0, 4, 2.0, None, fresh_encoder, fresh, algo="loha", dora_wd="True")
    network.apply_to(fresh_encoder, fresh)
    report = torch.nn.ModuleDict({"module": network}).load_state_dict({f"module.{k}": v for k, v in state.items()})
    assert not report.missing_keys
    assert not report.unexpected_keys
    network.eval()
    torch.testing.assert_close(output(fresh_encoder.eval(), fresh.eval()), output(encoder, denoiser), rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        network.load_state_dict({**state, "lora_unet_conv_in.nothing": torch.ones(1)})
