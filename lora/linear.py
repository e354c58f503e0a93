"""A linear layer with adapters, and putting them into a decoder."""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Decoder, ModelConfig
from plumbing import ranks

TARGETS = ("qkv", "out", "gate_up", "down")  # the products of a layer


@dataclass(frozen=True)
class LoRA:
    rank: int                            # R
    alpha: float
    targets: tuple[str, ...] = TARGETS   # the products that have adapters
    rank_stabilized: bool = False        # scale alpha / sqrt(R) (arXiv 2312.03732)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


class LoRALinear(nn.Linear):
    """W x + bias + scale * B A x: (T, in) -> (T, out). It takes over the weight and the bias of `base`.

    parts: how many rows of W, and of lora_B, each of the parts has that are stacked in it
    """

    def __init__(self, base: nn.Linear, parts: list[int], lora: LoRA):
        has_bias = base.bias is not None
        super().__init__(base.in_features, base.out_features, has_bias, device="meta")
        self.weight = base.weight
        self.bias = base.bias
        self.parts = parts
        self.lora = lora
        rows_of_a = len(parts) * lora.rank
        new = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(rows_of_a, base.in_features, **new))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, lora.rank, **new))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.linear(x, self.lora_A)  # (T, parts * R)
        pairs = zip(inner.split(self.lora.rank, dim=-1), self.lora_B.split(self.parts), strict=True)
        outer = torch.cat([F.linear(some, b) for some, b in pairs], dim=-1)  # (T, out)
        return F.linear(x, self.weight, self.bias) + self.lora.scale * outer


def change(a: Tensor, b: Tensor, parts: list[int], lora: LoRA) -> Tensor:
    """What adapters add to the weight: lora_A (parts * R, in), lora_B (out, R) -> scale * B A, (out, in)."""
    products = [some_b @ some_a for some_a, some_b in zip(a.split(lora.rank), b.split(parts), strict=True)]
    return lora.scale * torch.cat(products)


def add_adapters(model: Decoder, lora: LoRA) -> None:
    """Put adapters without values into a decoder, and freeze everything else in it."""
    parts = stacked_parts(model.config)
    for layer in model.layers:
        for module in (layer.attention, layer.mlp):
            for name, linear in list(module.named_children()):
                if name in lora.targets:
                    setattr(module, name, LoRALinear(linear, parts[name], lora))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(("lora_A", "lora_B")))


def stacked_parts(config: ModelConfig) -> dict[str, list[int]]:
    """The rows of each part of a product: q, k, v; gate, up; the others have one part."""
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    return {
        "qkv": [q, kv, kv],
        "out": [config.hidden_size],
        "gate_up": [config.intermediate_size, config.intermediate_size],
        "down": [config.hidden_size],
    }


@torch.no_grad()
def initialize(model: Decoder, seed: int) -> None:
    """A uniform within ±1 / sqrt(in), as in PEFT, and B zero. Any number of ranks get the same values."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            bound = module.in_features ** -0.5
            a = torch.empty(module.lora_A.shape).uniform_(-bound, bound, generator=generator)
            own, first = ranks.own_rows(module.lora_A)
            own.copy_(a[first:first + len(own)])
            ranks.own_rows(module.lora_B)[0].zero_()


def lora_of(model: Decoder) -> LoRA | None:
    """The adapters that a decoder has; None: it has none."""
    return next((module.lora for module in model.modules() if isinstance(module, LoRALinear)), None)
