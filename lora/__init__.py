"""LoRA (arXiv 2106.09685): the weights stay as they are, and each matrix learns a change of low rank.

    y = W x + scale * B A x      scale = alpha / R

    W (out, in)   frozen: no gradient is computed for it, and no moments are kept
    A (R, in)     trained, fp32; random at the start
    B (out, R)    trained, fp32; zero at the start, so that training begins with the model as it was

The decoder has q, k and v in one product, and gate and up in another. Each of these parts has an A and a B of
its own, as in PEFT, which sees them as separate matrices. They are stacked as the weights are:

    lora_A (parts * R, in)   the parts' A, one above the other
    lora_B (out, R)          the parts' B, one above the other: row i changes row i of W

Biases, norms, embedding and head are frozen. The files are those of PEFT (checkpoint/adapter.py). Left out:
dropout, DoRA, quantised weights.
"""
from lora.linear import TARGETS, LoRA, LoRALinear, add_adapters, change, initialize, lora_of

__all__ = ["TARGETS", "LoRA", "LoRALinear", "add_adapters", "change", "initialize", "lora_of"]
