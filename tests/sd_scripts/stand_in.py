"""What sd-scripts' trainer and its `gen_img.py` do with a network, call by call, without sd-scripts.

The order is that of `NetworkTrainer.train`: base weights, the network, `apply_to`, weights to resume from, the
optimiser's groups, then freezing and casting of the models, accelerate, steps, and the file.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Options:
    """The command line."""

    network_dim: int | None = 4
    network_alpha: float | None = 2.0
    network_args: Sequence[str] = ()
    network_dropout: float | None = None
    network_weights: Path | None = None
    dim_from_weights: bool = False
    base_weights: Sequence[Path] = ()
    base_weights_multiplier: Sequence[float] = ()
    scale_weight_norms: float | None = None
    text_encoder_lr: Any = None
    unet_lr: float | None = None
    learning_rate: float = 1e-2
    train_text_encoder: bool = True
    train_unet: bool = True
    full_bf16: bool = False
    gradient_checkpointing: bool = False
    steps: int = 3
    fp8_base: bool = False


@dataclass
class Trained:
    """What is left after training."""

    network: Any
    groups: list[dict[str, Any]]
    descriptions: list[str]
    norms: list[tuple[int, float, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def unet() -> nn.Module:
    """A UNet of diffusers' with two levels."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    model: nn.Module = UNet2DConditionModel(
        block_out_channels=(16, 24),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    return model


def text_encoder(layers: int = 2) -> nn.Module:
    """A CLIP of two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(2)
    model: nn.Module = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=50,
            hidden_size=12,
            intermediate_size=20,
            num_hidden_layers=layers,
            num_attention_heads=3,
            max_position_embeddings=8,
        )
    )
    return model


def output(encoder: nn.Module, denoiser: nn.Module, seed: int = 5) -> Tensor:
    """What the two compute of a fixed input, without gradients."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 48, (2, 8), generator=generator)
    x = torch.randn(2, 4, 8, 8, generator=generator).to(next(denoiser.parameters()).dtype)
    with torch.no_grad():
        found: Tensor = denoiser(x, torch.tensor([300, 700]), encoder(ids)[0]).sample
    return found


def arguments(options: Options) -> dict[str, Any]:
    """`--network_args` as the trainer parses it: always text."""
    found: dict[str, Any] = dict(arg.split("=", 1) for arg in options.network_args)
    return found


def train(encoder: Any, denoiser: nn.Module, options: Options, file: Path | None = None) -> Trained:
    """One run of the trainer; the file is written at the end."""
    module = importlib.import_module("nerine.kohya")
    encoders = encoder if isinstance(encoder, list) else [encoder]
    for i, path in enumerate(options.base_weights):
        given = options.base_weights_multiplier
        multiplier = given[i] if i < len(given) else 1.0
        base, tensors = module.create_network_from_weights(
            multiplier, path, None, encoder, denoiser, for_inference=True
        )
        base.merge_to(encoder, denoiser, tensors, torch.float32, "cpu")
    network = _network(module, encoder, denoiser, options)
    if hasattr(network, "prepare_network"):
        network.prepare_network(options)
    network.apply_to(encoder, denoiser, options.train_text_encoder, options.train_unet)
    if options.network_weights is not None:
        network.load_weights(options.network_weights)
    if options.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
        network.enable_gradient_checkpointing()
    groups, descriptions = network.prepare_optimizer_params_with_multiple_te_lrs(
        options.text_encoder_lr, options.unet_lr, options.learning_rate
    )
    optimiser = torch.optim.AdamW(groups)
    dtype = torch.bfloat16 if options.full_bf16 else torch.float32
    if options.full_bf16:
        network.to(dtype)
    denoiser.requires_grad_(False)
    denoiser.to(dtype)
    for model in encoders:
        model.requires_grad_(False)
        model.to(dtype)
    network.to("cpu")  # what accelerate does first
    network.prepare_grad_etc(encoder, denoiser)
    trained = Trained(network, groups, descriptions)
    _steps(trained, optimiser, encoders[0], denoiser, options)
    if file is not None:
        network.save_weights(str(file), dtype if options.full_bf16 else None, {"ss_network_module": "nerine.kohya"})
    return trained


def _network(module: Any, encoder: Any, denoiser: nn.Module, options: Options) -> Any:
    kwargs = arguments(options)
    if options.dim_from_weights:
        network, _ = module.create_network_from_weights(1, options.network_weights, None, encoder, denoiser, **kwargs)
        return network
    if "dropout" not in kwargs:
        kwargs["dropout"] = options.network_dropout
    return module.create_network(
        1.0,
        options.network_dim,
        options.network_alpha,
        None,
        encoder,
        denoiser,
        neuron_dropout=options.network_dropout,
        **kwargs,
    )


def _steps(trained: Trained, optimiser: Any, encoder: nn.Module, denoiser: nn.Module, options: Options) -> None:
    network = trained.network
    generator = torch.Generator().manual_seed(9)
    denoiser.train()
    encoder.train()
    network.on_epoch_start(encoder, denoiser)
    dtype = next(denoiser.parameters()).dtype
    for _ in range(options.steps):
        network.on_step_start(encoder, denoiser)
        ids = torch.randint(0, 48, (1, 8), generator=generator)
        x, target = (torch.randn(1, 4, 8, 8, generator=generator).to(dtype) for _ in range(2))
        found = denoiser(x, torch.tensor([500]), encoder(ids)[0]).sample
        loss = (found - target).float().square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.get_trainable_params(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        trained.losses.append(float(loss.detach()))
        if options.scale_weight_norms:
            trained.norms.append(network.apply_max_norm_regularization(options.scale_weight_norms, "cpu"))
    network.eval()
    denoiser.eval()
    encoder.eval()


def generate(
    encoder: Any, denoiser: nn.Module, files: Mapping[Path, float], merge: bool = False, beforehand: bool = False
) -> list[Any]:
    """What `gen_img.py` does with the files of networks, each with its multiplier."""
    module = importlib.import_module("nerine.kohya")
    networks = []
    for file, multiplier in files.items():
        network, tensors = module.create_network_from_weights(
            multiplier, str(file), None, encoder, denoiser, for_inference=True
        )
        if merge and network.is_mergeable():
            network.merge_to(encoder, denoiser, tensors, torch.float32, "cpu")
            continue
        network.apply_to(encoder, denoiser)
        network.load_state_dict(tensors, False)
        network.to(torch.float32).to("cpu")
        if beforehand:
            network.backup_weights()
        networks.append(network)
    for network, multiplier in zip(networks, files.values(), strict=False):
        network.set_multiplier(multiplier)
    if beforehand:
        for network in networks:
            network.restore_weights()
        for network in networks:
            network.pre_calculation()
    return networks
