"""What each weight of a model is for, on small trees that nobody has a list of classes for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nerine.model.structure import ROLES, Structure


class Tree(nn.Module):
    """A module of named parts."""

    def __init__(self, /, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class Attention(Tree):
    def __init__(self, names: str = "to_q to_k to_v to_out", width: int = 8) -> None:
        super().__init__(**{name: nn.Linear(width, width) for name in names.split()})


class Block(Tree):
    """Its class is one thing that a model of tomorrow will call otherwise."""


class Other(Tree):
    """So is this."""


def feed(inner: int = 24) -> Tree:
    return Tree(up=nn.Linear(8, inner), act=nn.GELU(), back=nn.Linear(inner, 8))


def resnet() -> Other:
    return Other(norm=nn.GroupNorm(1, 8), conv1=nn.Conv2d(8, 12, 3), time=nn.Linear(8, 12), conv2=nn.Conv2d(12, 8, 3))


def sampler() -> Other:
    return Other(op=nn.Conv2d(8, 8, 3, stride=2))


def transformer() -> Other:
    inner = nn.ModuleList([Block(attn=Attention(), ff=feed())])
    return Other(proj_in=nn.Conv2d(8, 8, 1), inner=inner, proj_out=nn.Conv2d(8, 8, 1))


def roles_of(model: nn.Module) -> dict[str, str]:
    """Roles in the order of `ROLES`, one text for each layer."""
    roles = Structure(model).roles
    return {path: " ".join(role for role in ROLES if role in found) for path, found in roles.items()}


def with_role(model: nn.Module, role: str) -> list[str]:
    return [path for path, roles in Structure(model).roles.items() if role in roles]


def test_a_transformer() -> None:
    model = Tree(
        img_in=nn.Linear(3, 8),
        time_in=nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 8)),
        blocks=nn.ModuleList([Block(mod=nn.Linear(8, 48), attn=Attention(), ff=feed()) for _ in range(2)]),
        final_layer=Tree(mod=nn.Sequential(nn.SiLU(), nn.Linear(8, 16)), linear=nn.Linear(8, 3)),
    )
    found = roles_of(model)
    for i in range(2):
        assert {k.removeprefix(f"blocks.{i}."): v for k, v in found.items() if k.startswith(f"blocks.{i}.")} == {
            "mod": "block transformer",
            "attn.to_q": "block transformer attention query",
            "attn.to_k": "block transformer attention key",
            "attn.to_v": "block transformer attention value",
            "attn.to_out": "block transformer attention",
            "ff.up": "block transformer feed_forward",
            "ff.back": "block transformer feed_forward down",
        }
    assert {v for k, v in found.items() if not k.startswith("blocks")} == {""}


@pytest.mark.parametrize("rows", ["diffusers", "in rows"])
def test_a_unet(rows: str) -> None:
    """As diffusers lays it out, and as its ancestors did, in Sequentials of blocks."""
    if rows == "diffusers":
        stage = Tree(
            resnets=nn.ModuleList([resnet(), resnet()]),
            attentions=nn.ModuleList([transformer(), transformer()]),
            downsamplers=nn.ModuleList([sampler()]),
        )
        model = Tree(conv_in=nn.Conv2d(3, 8, 3), down=nn.ModuleList([stage]), mid=Tree(r=nn.ModuleList([resnet()])))
        convs = ["down.0.resnets.0", "down.0.resnets.1", "down.0.downsamplers.0", "mid.r.0"]
        attentions = ["down.0.attentions.0", "down.0.attentions.1"]
    else:
        steps = [
            nn.Sequential(nn.Conv2d(3, 8, 3)),
            nn.Sequential(resnet(), transformer()),
            nn.Sequential(sampler()),
            nn.Sequential(resnet()),
        ]
        middle = nn.Sequential(resnet(), transformer(), resnet())
        out = nn.Sequential(nn.GroupNorm(1, 8), nn.SiLU(), nn.Conv2d(8, 3, 3))
        label = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 8)))
        model = Tree(label_emb=label, input_blocks=nn.ModuleList(steps), middle_block=middle, out=out)
        convs = ["input_blocks.1.0", "input_blocks.2.0", "input_blocks.3.0", "middle_block.0", "middle_block.2"]
        attentions = ["input_blocks.1.1", "middle_block.1"]
    every = list(roles_of(model))
    below = [path for path in every if any(path.startswith(f"{c}.") for c in convs)]
    around = [path for path in every if any(path.startswith(f"{a}.") for a in attentions)]
    assert with_role(model, "convolution") == below
    assert with_role(model, "transformer") == around
    assert set(with_role(model, "block")) == {*below, *around}
    assert with_role(model, "down") == [path for path in around if path.endswith("ff.back")]
    assert not any("proj_in" in p or "proj_out" in p for p in with_role(model, "feed_forward"))


def test_a_stage_whose_parts_are_in_no_list() -> None:
    stage = Tree(res=nn.ModuleList([resnet()]), mid=Tree(attn=Attention(), ff=feed()), down=nn.Conv2d(8, 8, 3))
    stage.add_module("emb", nn.Linear(4, 8))
    model = nn.ModuleList([stage])
    assert with_role(model, "convolution") == [*(f"0.res.0.{n}" for n in ("conv1", "time", "conv2")), "0.down"]
    assert with_role(model, "transformer") == [p for p in roles_of(model) if p.startswith("0.mid")]
    assert with_role(model, "down") == ["0.mid.ff.back"]
    assert roles_of(model)["0.emb"] == "block"


def test_blocks_in_blocks_are_one() -> None:
    """T5: a layer is a block of two, one of which is attention."""
    layer = Tree(layer=nn.ModuleList([Tree(SelfAttention=Attention("q k v o")), Tree(Dense=feed())]))
    model = Tree(shared=nn.Embedding(9, 8), block=nn.ModuleList([layer]))
    assert len(with_role(model, "transformer")) == 6
    assert with_role(model, "down") == ["block.0.layer.1.Dense.back"]


def test_a_block_that_stands_alone_is_known_by_the_class_of_the_others() -> None:
    def block() -> Block:
        return Block(attn=Attention(), ff=feed())

    model = Tree(middle=block(), blocks=nn.ModuleList([block(), block()]), lone=Other(attn=Attention()))
    assert with_role(model, "block") == [p for p in roles_of(model) if not p.startswith("lone")]


def test_numbered_dictionaries_are_lists() -> None:
    blocks = nn.ModuleDict({str(i): Tree(attn=Attention(), ff=feed()) for i in (0, 2)})
    assert len(with_role(Tree(blocks=blocks), "transformer")) == 12
    named = nn.ModuleDict({"a": Tree(attn=Attention(), ff=feed()), "b": Tree(ff=feed())})
    assert not Structure(Tree(parts=named)).has_blocks


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)),
        nn.Sequential(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.Sequential(nn.Linear(3, 2))),
        nn.ModuleList([nn.Linear(4, 3), nn.Linear(3, 4)]),
        Tree(projections=nn.ModuleList([Tree(linear=nn.Linear(4, 3)), Tree(linear=nn.Linear(4, 3))])),
        Tree(net=nn.ModuleList([Tree(proj=nn.Linear(4, 12)), nn.Dropout(), nn.Linear(12, 4)])),
        Tree(embed=nn.Sequential(nn.Identity(), Tree(a=nn.Linear(4, 3), b=nn.Linear(3, 4)))),
        nn.Linear(4, 3),
    ],
)
def test_what_has_no_blocks(model: nn.Module) -> None:
    assert not Structure(model).has_blocks


@pytest.mark.parametrize(
    ("names", "keys", "values"),
    [
        ("q_proj k_proj v_proj out_proj", "k_proj", "v_proj"),
        ("query key value dense", "key", "value"),
        ("to_query to_key to_value out_layer", "to_key", "to_value"),
        ("qkv proj", "qkv", "qkv"),
        ("Wqkv Wo", "Wqkv", "Wqkv"),
        ("c_attn c_proj", "c_attn", "c_attn"),
        ("query_key_value dense", "query_key_value", "query_key_value"),
        ("q_linear kv_linear proj", "kv_linear", "kv_linear"),
        ("to_qkv_mlp_proj to_out", "to_qkv_mlp_proj", "to_qkv_mlp_proj"),
        ("q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj", "kv_a_proj_with_mqa kv_b_proj", "kv_a_proj_with_mqa"),
        ("q_lin k_lin v_lin out_lin", "k_lin", "v_lin"),
        ("key value receptance output", "key", "value"),
    ],
)
def test_names_of_projections(names: str, keys: str, values: str) -> None:
    model = nn.ModuleList([Tree(anything=Attention(names), ff=feed())])
    assert with_role(model, "attention") == [f"0.anything.{name}" for name in names.split()]
    assert with_role(model, "key") == [f"0.anything.{name}" for name in keys.split()]
    assert set(with_role(model, "value")) >= {f"0.anything.{name}" for name in values.split()}


@pytest.mark.parametrize("names", ["a b c d", "in_proj x_proj dt_proj out_proj", "q_proj k_proj", "mask like this"])
def test_what_is_no_attention(names: str) -> None:
    model = nn.ModuleList([Tree(mixer=Attention(names)), Tree(mixer=Attention(names))])
    assert with_role(model, "attention") == with_role(model, "transformer") == []


def test_attention_whose_output_is_beside_it() -> None:
    """BERT: `attention` has `self` and `output`."""
    block = Tree(
        attention=Tree(self=Attention("query key value"), output=Tree(dense=nn.Linear(8, 8), norm=nn.LayerNorm(8))),
        intermediate=Tree(dense=nn.Linear(8, 24)),
        output=Tree(dense=nn.Linear(24, 8)),
    )
    model = Tree(layer=nn.ModuleList([block]))
    inside = [f"layer.0.attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")]
    assert with_role(model, "attention") == inside
    assert with_role(model, "down") == ["layer.0.output.dense"]


def test_attention_that_is_no_module_of_its_own() -> None:
    """HunyuanVideo as first published: projections of two streams right in the block."""
    names = ("img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj", "img_mod")
    block = Tree(**{name: nn.Linear(8, 8) for name in names}, img_mlp=feed(), txt_mlp=feed())
    model = nn.ModuleList([block])
    assert with_role(model, "attention") == [f"0.{name}" for name in names[:4]]
    assert with_role(model, "down") == ["0.img_mlp.back", "0.txt_mlp.back"]


def test_a_norm_of_queries_shows_an_attention() -> None:
    """Flux as first published: one layer makes queries, keys, values and the feed-forward layer."""
    norms = Tree(query_norm=nn.LayerNorm(4), key_norm=nn.LayerNorm(4))
    block = Tree(linear1=nn.Linear(8, 56), linear2=nn.Linear(40, 8), norm=norms)
    model = nn.ModuleList([block])
    assert with_role(model, "transformer") == ["0.linear1", "0.linear2"]
    assert with_role(model, "attention") == []
    assert with_role(model, "down") == ["0.linear2"]
    plain = Tree(linear1=nn.Linear(8, 56), linear2=nn.Linear(40, 8), norm=nn.LayerNorm(8))
    assert with_role(nn.ModuleList([plain]), "transformer") == []


def test_parameters_show_an_attention() -> None:
    """XLNet."""
    holder = Tree()
    for name in ("q", "k", "v", "o"):
        holder.register_parameter(name, nn.Parameter(torch.ones(8, 2, 4)))
    model = nn.ModuleList([Tree(rel_attn=holder, ff=feed())])
    assert with_role(model, "transformer") == ["0.ff.up", "0.ff.back"]


def test_attention_blocks_of_torch() -> None:
    model = Tree(layers=nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 24), 2, enable_nested_tensor=False))
    found = roles_of(model)
    assert found["layers.layers.1.self_attn.in_proj_weight"] == "block transformer attention query key value"
    assert found["layers.layers.1.self_attn.out_proj"] == "block transformer attention"
    assert found["layers.layers.1.linear1"] == "block transformer feed_forward"
    assert found["layers.layers.1.linear2"] == "block transformer feed_forward down"
    apart = nn.ModuleList([nn.MultiheadAttention(8, 2, kdim=6, vdim=4)])
    assert with_role(apart, "key") == ["0.k_proj_weight"]
    assert with_role(apart, "value") == ["0.v_proj_weight"]
    assert with_role(apart, "attention")[-1] == "0.out_proj"


def linear(*shapes: tuple[int, int], names: str = "w1 w2 w3") -> Tree:
    return Tree(**{name: nn.Linear(*shape) for name, shape in zip(names.split(), shapes, strict=False)})


@pytest.mark.parametrize(
    ("ff", "down"),
    [
        (linear((8, 24), (24, 8), (8, 24)), ["w2"]),
        (linear((8, 24), (8, 24), (24, 8)), ["w3"]),
        (linear((8, 4), (4, 8), (8, 4)), ["w2"]),
        (linear((8, 8), (8, 8), (8, 8)), ["w2"]),
        (linear((8, 48), (24, 8)), ["w2"]),
        (linear((8, 8), (8, 8)), ["w2"]),
        (linear((8, 24), (24, 8), (8, 24), names="proj out gate_layer"), ["out"]),
        (linear((8, 24), (24, 6)), []),
        (Tree(norm1=nn.Linear(8, 24), adaLN_modulation=nn.Linear(24, 8)), []),
        (Tree(a=nn.Conv2d(8, 24, 1), deep=nn.Conv2d(24, 24, 3, groups=24), b=nn.Conv2d(24, 8, 1)), ["b"]),
        (Tree(net=nn.ModuleList([Tree(proj=nn.Linear(8, 24)), nn.Dropout(), nn.Linear(24, 8)])), ["net.2"]),
        (Tree(router=nn.Linear(8, 4), shared=linear((8, 24), (24, 8), (8, 24))), ["shared.w2"]),
        (Tree(experts=nn.ModuleList([linear((8, 24), (24, 8)) for _ in range(2)])), ["experts.0.w2", "experts.1.w2"]),
    ],
)
def test_the_layer_that_leads_back(ff: nn.Module, down: list[str]) -> None:
    model = nn.ModuleList([Tree(attn=Attention(), ff=ff, ff_context=feed())])
    assert with_role(model, "down") == [*(f"0.ff.{name}" for name in down), "0.ff_context.back"]


def test_feed_forward_layers_right_in_the_block() -> None:
    block = Tree(self_attn=Attention(), fc1=nn.Linear(8, 24), fc2=nn.Linear(24, 8), norm=nn.LayerNorm(8))
    assert with_role(nn.ModuleList([block]), "down") == ["0.fc2"]


@pytest.mark.parametrize(
    ("extra", "is_one"),
    [
        ({"embed": nn.Embedding(9, 8)}, True),
        ({"embeddings": Tree(token=nn.Embedding(9, 8), position=nn.Embedding(9, 8))}, True),
        ({}, False),
        ({"embed": nn.Embedding(9, 8), "time_embed": nn.Linear(4, 8)}, False),
        ({"embed": nn.Embedding(9, 8), "t_embedder": Tree(mlp=nn.Linear(4, 8))}, False),
        ({"in": Tree(timestep_embedder=nn.Linear(4, 8)), "embed": nn.Embedding(9, 8)}, False),
    ],
)
def test_what_looks_like_a_text_encoder(extra: dict[str, nn.Module], is_one: bool) -> None:
    blocks = nn.ModuleList([Tree(attn=Attention(), ff=feed(), norm=Tree(time=nn.Embedding(4, 8)))])
    assert Structure(Tree(**extra, blocks=blocks)).is_text_encoder() is is_one


def test_a_module_that_is_there_twice_is_read_once() -> None:
    block = Tree(attn=Attention(), ff=feed())
    model = Tree(blocks=nn.ModuleList([block, block]), again=block)
    assert with_role(model, "transformer") == [p for p in roles_of(model) if p.startswith("blocks.0")]
