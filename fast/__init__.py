"""The same numbers, sooner. Each file says what the plain thing is, why the fast one equals it, and what it
gains.

    engine.py        decoding with continuous batching; continuations that agree are one row
    rows.py          the batch's columns
    cache.py         decoding's keys and values: a shared prefix, one copy a prompt, one a row
    nucleus.py       top-p without sorting the vocabulary

    on CPU
    kernels.py       products, norms, inputs made again in the backward pass; `speed_up(model)` puts them in
    attention.py     training and prefill: blocks of queries, shared keys met once
    memory.py        the C library's allocator

    on a GPU
    fused.py         small operations, each function compiled into one kernel
    flex.py          training through flex_attention, prefill with a mask
    triton_cache.py  decoding's attention as a kernel in Triton
    graphs.py        the engine's step recorded as a CUDA graph

The scripts take these unless they are given --plain, and the tests hold them to the plain ones.
"""
from fast.engine import Engine
from fast.graphs import RecordedEngine
from fast.kernels import pack_weights, speed_up
from fast.memory import keep_freed_memory
from model import Decoder

__all__ = ["engine_for", "for_sampling", "keep_freed_memory", "pack_weights", "speed_up"]


def engine_for(model: Decoder) -> type[Engine]:
    """The fast engine's class, by the device that the model lies on."""
    return RecordedEngine if model.device.type == "cuda" else Engine


def for_sampling(model: Decoder) -> type[Engine]:
    """Make a model fast for sampling; it cannot be trained or saved any more. -> the engine's class."""
    speed_up(model)
    pack_weights(model)
    return engine_for(model)
