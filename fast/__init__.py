"""The same numbers, sooner. Each file says what the plain thing is, why the fast one equals it, and what it
gains.

    attention.py   training and prefill on CPU: blocks of queries, shared keys met once
    flex.py        the same on a GPU, through flex_attention
    kernels.py     products, norms and SwiGLU; `speed_up(model)` puts all three into a model
    nucleus.py     top-p without sorting the vocabulary
    cache.py       decoding's keys and values: a shared prefix, one copy a prompt, one a row
    rows.py        the batch's columns
    engine.py      decoding with continuous batching; continuations that agree are one row
    graphs.py      the engine's step recorded as a CUDA graph
    memory.py      the C library's allocator

The scripts take these unless they are given --plain, and the tests hold them to the plain ones.
"""
from fast.engine import Engine
from fast.graphs import RecordedEngine
from fast.kernels import pack_weights, speed_up
from fast.memory import keep_freed_memory
from model import Decoder

__all__ = ["engine_for", "keep_freed_memory", "pack_weights", "speed_up"]


def engine_for(model: Decoder) -> type[Engine]:
    """The fast engine's class, by the device that the model lies on."""
    return RecordedEngine if model.device.type == "cuda" else Engine
