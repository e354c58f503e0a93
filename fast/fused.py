"""The decoder's small operations on a GPU, each made into one kernel by torch.compile.

Plain (model.py): a norm, RoPE, the activation and the log-probabilities are some operations each, and each of
them reads its tensors from the GPU's memory and writes its result there. Fast: torch.compile makes one kernel
of such a function, and one of its backward pass, which reads its inputs once and writes its outputs once. The
operations are the same; in bf16 there are fewer roundings, as what lies between them stays in fp32. Matrix
products and attention stay outside.

A function is compiled, in seconds, when it is first called, and again for another type, for passes without
gradients, and for a single token; but not for each number of tokens.
"""
from functools import cache
from types import MethodType
from typing import Callable

import torch
from torch import Tensor

import model as plain
from fast.flex import allow_variants, tree_attention
from model import MLP, Attention, Decoder, RMSNorm


def fuse(model: Decoder) -> None:
    """Compile what lies between the products of a decoder that is on a GPU."""
    norms = [model.norm]
    for layer in model.layers:
        norms += [layer.attention_norm, layer.mlp_norm]  # norms of queries and keys are a part of `heads`
        layer.attention.heads = MethodType(fused(Attention.heads), layer.attention)
        layer.mlp.activate = fused(MLP.activate)
    for norm in norms:
        norm.forward = MethodType(fused(RMSNorm.forward), norm)
    model.logprobs = MethodType(logprobs, model)
    model.tree_attention = tree_attention


def logprobs(self: Decoder, hidden: Tensor, target: Tensor) -> Tensor:
    return fused(plain.logprobs_of)(self.logits(hidden), target)


@cache
def fused(function: Callable) -> Callable:
    """A function of tensors, compiled at its first call. The first dimension of its tensors may change."""
    allow_variants()
    compiled = torch.compile(function)

    def call(*args):
        for x in args:
            if torch.is_tensor(x):
                torch._dynamo.maybe_mark_dynamic(x, 0)
        return compiled(*args)
    return call
