"""Mistakes that a type checker must see through nerine's types: one a line, each marked with WRONG. Never run."""

import torch
from torch import nn

import nerine
import nerine.tools

layer = nn.Linear(4, 3)
network = nerine.attach(layer, nerine.LoRA(rank=2))

nerine.LoRA(rank="8")  # WRONG: a text is no rank
nerine.LoRA(ranks=8)  # WRONG: no such setting
nerine.LoRA(8)  # WRONG: settings are named
nerine.DoRA("lokr")  # WRONG: around an algorithm, not a name
nerine.attach(layer, 8)  # WRONG: no algorithm
nerine.load(layer, 3)  # WRONG: no file
nerine.save(network, "x.safetensors", dtype="fp16")  # WRONG: a torch.dtype
nerine.Rule("*", nerine.LoRA(), lr="1e-4")  # WRONG: a rate is a number
network.merge(keep=True)  # WRONG: keep_original
network.no_such_method()  # WRONG
network.state_dict()["x"].no_such_method()  # WRONG: values are tensors
x: int = network.strength  # WRONG: a float
y: torch.Tensor = nerine.plan(layer, nerine.LoRA())  # WRONG: a Plan
nerine.lora(rank=8)  # WRONG: no such name
nerine.tools.merge("base.safetensors", ["a.safetensors"])  # WRONG: where to write
print(nerine.tools.mergee)  # WRONG: no such name
