"""A UNet of SDXL's blocks and layers at a twentieth of its width that can be called: 794 layers with little to do.

The modules are those of `attach.py`, which never calls them; here is what passes through them. Attention has one head
and sampling is the plainest there is: what matters are the layers and their order.
"""

from __future__ import annotations

import torch
from attach import Block, Resnet, Transformer, TransformerBlock, UNet
from suite_models import ModelProblem
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["WIDTH", "Running", "unet_problem"]

WIDTH, SIDE, TOKENS = 0.05, 8, 8


class Running(nn.Module):
    """The UNet with its text, its timestep and its pooled text."""

    def __init__(self, width: float = WIDTH) -> None:
        super().__init__()
        self.inner = UNet(width)
        text = self.inner.mid_attention.transformer_blocks[0].attn2.to_k.in_features
        self.register_buffer("text", torch.randn(1, TOKENS, text))
        self.register_buffer("time", torch.randn(1, self.inner.time_embedding[0].in_features))
        self.register_buffer("pooled", torch.randn(1, self.inner.add_embedding[0].in_features))

    def forward(self, x: Tensor) -> Tensor:
        net = self.inner
        time = _two(net.time_embedding, self.time) + _two(net.add_embedding, self.pooled)
        h = net.conv_in(x)
        skips = [h]
        for block in net.down_blocks:
            h = _down(block, h, time, self.text, skips)
        h = _resnet(net.mid_resnets[0], h, time)
        h = _resnet(net.mid_resnets[1], _transformer(net.mid_attention, h, self.text), time)
        for block in net.up_blocks:
            h = _up(block, h, time, self.text, skips)
        out: Tensor = net.conv_out(functional.silu(net.conv_norm_out(h)))
        return out


def _two(layers: nn.ModuleList, x: Tensor) -> Tensor:
    out: Tensor = layers[1](functional.silu(layers[0](x)))
    return out


def _resnet(r: Resnet, x: Tensor, time: Tensor) -> Tensor:
    h = r.conv1(functional.silu(r.norm1(x))) + r.time_emb_proj(functional.silu(time))[:, :, None, None]
    h = r.conv2(functional.silu(r.norm2(h)))
    skip: Tensor = r.conv_shortcut(x) if hasattr(r, "conv_shortcut") else x
    return skip + h


def _attention(attention: nn.Module, x: Tensor, context: Tensor) -> Tensor:
    q, k, v = attention.to_q(x), attention.to_k(context), attention.to_v(context)
    out: Tensor = attention.to_out[0](functional.scaled_dot_product_attention(q, k, v))
    return out


def _transformer_block(b: TransformerBlock, x: Tensor, text: Tensor) -> Tensor:
    h = b.norm1(x)
    x = x + _attention(b.attn1, h, h)
    x = x + _attention(b.attn2, b.norm2(x), text)
    value, gate = b.ff[0](b.norm3(x)).chunk(2, -1)
    out: Tensor = x + b.ff[2](value * functional.gelu(gate))
    return out


def _transformer(t: Transformer, x: Tensor, text: Tensor) -> Tensor:
    h = t.proj_in(t.norm(x).flatten(2).mT)
    for block in t.transformer_blocks:
        h = _transformer_block(block, h, text)
    return x + t.proj_out(h).mT.reshape(x.shape)


def _down(block: Block, h: Tensor, time: Tensor, text: Tensor, skips: list[Tensor]) -> Tensor:
    for number, resnet in enumerate(block.resnets):
        h = _resnet(resnet, h, time)
        if len(block.attentions):
            h = _transformer(block.attentions[number], h, text)
        skips.append(h)
    if not isinstance(block.sampler, nn.Identity):
        h = block.sampler(h)[..., ::2, ::2]
        skips.append(h)
    return h


def _up(block: Block, h: Tensor, time: Tensor, text: Tensor, skips: list[Tensor]) -> Tensor:
    for number, resnet in enumerate(block.resnets):
        h = _resnet(resnet, torch.cat([h, skips.pop()], 1), time)
        if len(block.attentions):
            h = _transformer(block.attentions[number], h, text)
    if not isinstance(block.sampler, nn.Identity):
        h = block.sampler(functional.interpolate(h, scale_factor=2.0))
    return h


def unet_problem() -> ModelProblem:
    """The model, frozen, in fp32, with an input of 8 by 8 that needs its gradient."""
    torch.manual_seed(0)
    model = Running().requires_grad_(False)
    x = torch.randn(1, 4, SIDE, SIDE)
    return ModelProblem(model, x.requires_grad_(), torch.randn(1, 4, SIDE, SIDE))
