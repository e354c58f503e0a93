"""What a training needs of memory: a table of estimates, printed before the first step."""
import math

import torch

from model import Decoder, ModelConfig, head_chunk
from plumbing import ranks


def print_budget(model: Decoder, n_examples: int, steps: int, batch_size: int, micro_tokens: int,
                 first_step: int, checkpoint_activations: bool) -> None:
    """Parameters, steps, tokens per step, estimated memory. first_step: tokens in its trees."""
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"budget: {n_parameters:,} parameters; {n_examples:,} examples, {steps:,} steps of {batch_size}; "
          f"first step {first_step:,} tokens in trees of at most {micro_tokens:,}")
    table = memory(model.config, micro_tokens, checkpoint_activations, model.device, ranks.count())
    print(f"memory, on each of {ranks.count()} ranks, about:" if ranks.count() > 1 else "memory, about:")
    for name, size in table.items():
        print_size(name, size)
    print_size("together", sum(table.values()))


def print_size(name: str, size: float) -> None:
    print(f"  {name:<58} {size / 1e9:7.2f} GB")


def memory(shape: ModelConfig, micro_tokens: int, checkpoint_activations: bool, device: torch.device | str,
           n_ranks: int) -> dict[str, float]:
    """Estimated bytes on the rank with the most rows of `n_ranks`, at full trees, by what they are for."""
    with torch.device("meta"):
        model = Decoder(shape)
    on_cuda = torch.device(device).type == "cuda"
    operand = 2 if on_cuda else 4  # bytes of a number in a matrix product: bf16 on CUDA, else fp32
    copy = 2 if on_cuda else 0     # bytes of a weight's bf16 copy
    rows = sum(math.ceil(len(p) / n_ranks) * p[0].numel() for p in model.parameters())  # a rank's weights
    layer = n_numbers(model.layers[0])
    around = n_numbers(model) - layer * len(model.layers)  # embedding, last norm, head
    activations = kept_of_a_token(shape, on_cuda)  # of each token in each layer
    logits = chunk_of_logits(shape, device, copy, n_ranks)

    table = {
        "weights, fp32": 4 * rows,
        "gradients, fp32": 4 * rows,
        "both moments, fp32": 8 * rows,
    }
    if n_ranks > 1:
        gathered = layer * (3 * operand + 4) + around * 8
        table["gathered: two layers, embedding and head, their gradients"] = gathered
    if checkpoint_activations:  # a layer keeps its input, fp32; the one at work has all of its activations
        layer_at_work = micro_tokens * activations + copy * layer
        table["activations, checkpointed"] = micro_tokens * 4 * shape.hidden_size * len(model.layers)
        table["at work: a layer, or a chunk of logits"] = max(layer_at_work, logits)
        return table
    if on_cuda and n_ranks == 1:
        table["weights again in bf16, for the backward pass"] = copy * rows
    table["activations"] = micro_tokens * activations * len(model.layers)
    table["at work: a chunk of logits"] = logits
    return table


def n_numbers(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def kept_of_a_token(shape: ModelConfig, on_cuda: bool) -> int:
    """Bytes that a layer keeps of a token for its backward pass.

    On the CPU, norms and SwiGLU are computed again in the backward pass (fast/kernels.py).
    """
    hidden = shape.hidden_size
    n_heads = 2 * shape.num_attention_heads + 2 * shape.num_key_value_heads  # q and the output; k and v
    heads = n_heads * shape.head_dim
    intermediate = shape.intermediate_size
    if on_cuda:
        return 2 * (6 * hidden + 2 * heads + 3 * intermediate)
    return 4 * (2 * hidden + heads + 2 * intermediate)


def chunk_of_logits(shape: ModelConfig, device: torch.device | str, copy: int, n_ranks: int) -> int:
    """Bytes of the head at work: fp32 logits of a chunk of tokens, three more of their size in the backward
    pass, and the head's bf16 copy and new gradient.
    """
    logits = head_chunk(device) * shape.vocab_size * 4
    head = shape.vocab_size * shape.hidden_size
    gradient = 4 * head if n_ranks == 1 else 0  # among several ranks it is counted with what is gathered
    return 4 * logits + copy * head + gradient
