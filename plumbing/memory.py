"""What a training needs of memory: a table of estimates, printed before the first step."""
import math

import torch

from lora import LoRA, add_adapters, lora_of
from model import Decoder, ModelConfig, head_chunk
from plumbing import ranks
from plumbing.adamw_8bit import BLOCK


def print_budget(model: Decoder, n_examples: int, steps: int, batch_size: int, micro_tokens: int,
                 first_step: int, checkpoint_activations: bool, adamw_8bit: bool) -> None:
    """Parameters, steps, tokens per step, estimated memory. first_step: tokens in its trees."""
    lora = lora_of(model)
    n_parameters = f"{n_numbers(model):,} parameters"
    if lora:
        n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        n_parameters += f", of which {n_trained:,} are trained, in adapters of rank {lora.rank}"
    print(f"budget: {n_parameters}; {n_examples:,} examples, {steps:,} steps of {batch_size}; "
          f"first step {first_step:,} tokens in trees of at most {micro_tokens:,}")
    table = memory(model.config, micro_tokens, checkpoint_activations, model.device, ranks.count(), lora,
                   adamw_8bit)
    print(f"memory, on each of {ranks.count()} ranks, about:" if ranks.count() > 1 else "memory, about:")
    for name, size in table.items():
        print_size(name, size)
    print_size("together", sum(table.values()))


def print_size(name: str, size: float) -> None:
    print(f"  {name:<58} {size / 1e9:7.2f} GB")


def memory(shape: ModelConfig, micro_tokens: int, checkpoint_activations: bool, device: torch.device | str,
           n_ranks: int, lora: LoRA | None = None, adamw_8bit: bool = False) -> dict[str, float]:
    """Estimated bytes on the rank with the most rows of `n_ranks`, at full trees, by what they are for."""
    with torch.device("meta"):
        model = Decoder(shape)
    layer = n_numbers(model.layers[0])
    embedding = n_numbers(model.embed)
    head = n_numbers(model) - layer * len(model.layers)  # and the last norm
    if model.head is not None:
        head -= embedding
    if lora:
        add_adapters(model, lora)
    frozen, trained = rows_of_a_rank(model, n_ranks)
    on_cuda = torch.device(device).type == "cuda"
    operand = 2 if on_cuda else 4  # bytes of a number in a matrix product: bf16 on CUDA, else fp32
    weight = operand if lora else 4  # of a weight, and so of a layer's input; frozen ones need no fp32
    gradient = 0 if lora else 4  # of a weight's gradient
    copy = operand if weight > operand else 0  # of a weight's bf16 copy
    activations = kept_of_a_token(shape, on_cuda)  # of each token in each layer
    of_head = copy + (gradient if n_ranks == 1 else 0)  # among several it is counted with what is gathered
    logits = chunk_of_logits(shape, head_chunk(device, micro_tokens), of_head)

    table = {
        "weights, fp32": 4 * trained,
        "gradients, fp32": 4 * trained,
        "both moments, fp32": 8 * trained,
    }
    if adamw_8bit:
        del table["both moments, fp32"]
        table["both moments, in 8 bits"] = 2 * (1 + 4 / BLOCK) * trained
    if lora:
        table = {
            f"weights, frozen, {'bf16' if on_cuda else 'fp32'}": weight * frozen,
            "adapters, their gradients and both moments, fp32": 16 * trained,
        }
    if n_ranks > 1:
        name = "gathered: two layers and the head" + ("" if lora else ", their gradients")
        table[name] = layer * (3 * operand + gradient) + head * (weight + gradient)
        if model.head is not None:  # its own weight is gathered at the end of the backward pass
            logits = max(logits, embedding * (weight + gradient))
    if checkpoint_activations:  # a layer keeps its input; the one at work has all of its activations
        layer_at_work = micro_tokens * activations + copy * layer
        table["activations, checkpointed"] = micro_tokens * weight * shape.hidden_size * len(model.layers)
        table["at work: a layer, a chunk of logits or the embedding"] = max(layer_at_work, logits)
        return table
    if copy and n_ranks == 1:
        table["weights again in bf16, for the backward pass"] = copy * trained
    table["activations"] = micro_tokens * activations * len(model.layers)
    table["at work: a chunk of logits or the embedding"] = logits
    return table


def rows_of_a_rank(model: Decoder, n_ranks: int) -> tuple[int, int]:
    """How many numbers of the frozen and of the trained parameters the rank with the most rows has."""
    found = {False: 0, True: 0}
    for p in model.parameters():
        found[p.requires_grad] += math.ceil(len(p) / n_ranks) * p[0].numel()
    return found[False], found[True]


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


def chunk_of_logits(shape: ModelConfig, chunk: int, of_head: int) -> int:
    """Bytes of the head at work: fp32 logits of a chunk of tokens, three more of their size in the backward
    pass, and `of_head` for each number of the head: its bf16 copy and new gradient.
    """
    logits = chunk * shape.vocab_size * 4
    return 4 * logits + of_head * shape.vocab_size * shape.hidden_size
