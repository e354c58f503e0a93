"""A model with random weights, to be trained from scratch."""
from pathlib import Path

import torch

from checkpoint.config import load_config
from model import Decoder
from plumbing import ranks


def new_model(folder: str | Path, device: str, context: int | None = None, seed: int = 0) -> Decoder:
    """The decoder of a folder's config.json with random weights, cut over the ranks."""
    model = Decoder(load_config(folder, context))
    init_weights(model, torch.Generator().manual_seed(seed))
    ranks.shard(model, device)
    return model.to(device)


@torch.no_grad()
def init_weights(model: Decoder, generator: torch.Generator) -> None:
    """As in GPT-2: N(0, initializer_range²), and residual outputs over sqrt(2 layers)."""
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            p.fill_(1.0)
        elif name.endswith("bias"):
            p.zero_()
        else:
            scale = model.config.initializer_range
            if name.endswith(("out.weight", "down.weight")):
                scale *= (2 * len(model.layers)) ** -0.5
            p.normal_(0.0, scale, generator=generator)
