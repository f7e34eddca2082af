"""Regional prompts of nerine.kohya beside those of sd-scripts' own network, on its UNet at a small size.

    python tests/sd_scripts/regions.py <sd-scripts checkout>

Two LoRA files with random tensors, two sub-prompts, as gen_img.py drives them. Prints JSON: the largest differences of
text encoder and UNet, and how far the networks move the output.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import tiny_models
import torch
from safetensors.torch import save_file

VOCABULARY = 188
MULTIPLIERS = (0.9, 0.6)


def files(own: Any, models: Any, folder: Path) -> list[str]:
    """Two files of sd-scripts' own network."""
    found = []
    for i in range(2):
        encoder, _, unet = models()
        network = own.create_network(1.0, 4, 2.0, None, encoder, unet)
        network.apply_to(encoder, unet, True, True)
        generator = torch.Generator().manual_seed(i)
        for parameter in network.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
        found.append(str(folder / f"{i}.safetensors"))
        save_file({key: t.contiguous() for key, t in network.state_dict().items()}, found[-1])
    return found


@torch.no_grad()
def picture(module: Any, models: Any, paths: list[str], multipliers: tuple[float, ...]) -> tuple[Any, Any]:
    """(what the text encoder gives, what the UNet gives) with both networks in their regions."""
    encoder, _, unet = models()
    encoder.eval(), unet.eval()
    networks, shared = [], {}
    for path in paths:
        network, tensors = module.create_network_from_weights(1.0, path, None, [encoder], unet, for_inference=True)
        network.apply_to([encoder], unet)
        network.load_state_dict(tensors, False)
        network.eval()
        networks.append(network)
    for i, network in enumerate(networks):
        mask = torch.zeros(64, 64)
        mask[:, 30 * i : 30 + 34 * i] = 1 - 0.3 * i
        network.set_region(i, i == len(networks) - 1, mask)
    for network, multiplier in zip(networks, multipliers, strict=True):
        network.set_multiplier(multiplier)
        network.set_current_generation(1, 2, 64, 64, shared, None)
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(0, 90, (3, 77), generator=generator)  # the unconditional prompt, two sub-prompts
    context = torch.cat([encoder(ids[:1])[0], encoder(ids[1:])[0]])
    x = torch.randn(2, 4, 8, 8, generator=generator)
    return context, unet(x, torch.tensor([300]), context).sample


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    import library.original_unet as original_unet
    import networks.lora as own

    from nerine import kohya

    tiny_models.patch(original_unet)

    def models() -> Any:
        return tiny_models.models(original_unet.UNet2DConditionModel, VOCABULARY)

    with tempfile.TemporaryDirectory() as folder:
        paths = files(own, models, Path(folder))
        theirs = picture(own, models, paths, MULTIPLIERS)
        ours = picture(kohya, models, paths, MULTIPLIERS)
        base = picture(own, models, paths, (0.0, 0.0))
    apart = [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]
    moved = [float((a - b).abs().max()) for a, b in zip(theirs, base, strict=True)]
    print(json.dumps({"text encoder": apart[0], "unet": apart[1], "moved": moved}))


if __name__ == "__main__":
    main()
