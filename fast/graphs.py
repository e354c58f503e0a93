"""The decoding step recorded as a CUDA graph, for a GPU.

Plain: a step is some thousands of small kernels, and starting them takes longer than running them. Fast: the
step's pass is recorded once and replayed with one launch. A replay does what was recorded, at the same
addresses: whatever changes from step to step is changed in place, in tensors, and shapes stand still. Hence
what differs from the engine that this one extends:

- each continuation is a row of its own from the start, and rows never branch;
- rows have room for WINDOW more tokens at a time, with a new recording when it is used up;
- rows are taken out when a quarter of them are done, since that means a new recording, which takes as long as
  some steps;
- the attention is a kernel of its own (fast/triton_cache.py).
"""
from typing import Callable

import torch
from torch import Tensor

from fast.cache import Cache
from fast.engine import Engine

WINDOW = 256  # tokens


class CudaGraph:
    """A function that reads and writes tensors on the GPU: run once, then recorded, then replayed.

    The tensor that it returns is overwritten by the next call.
    """

    def __init__(self, work: Callable[[], Tensor]):
        self.work = work
        self.warm = False
        self.graph = None

    def __call__(self) -> Tensor:
        if not self.warm:  # libraries load their kernels at the first call, which cannot be recorded
            self.warm = True
            return self.work()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = self.work()
        self.graph.replay()
        return self.out


class RecordedEngine(Engine):
    """The engine whose steps are replayed. It samples what the other one does."""

    done_share = 1 / 4

    def new_cache(self) -> Cache:
        if self.model.device.type != "cuda":
            return super().new_cache()
        from fast.triton_cache import TritonCache  # here, as Triton comes with PyTorch for GPUs alone
        return TritonCache(self.model)

    def rows_of(self, k: int) -> int:
        return k

    def branch(self, draws: slice, token: Tensor) -> Tensor:
        return self.draws.row[draws]

    def width(self) -> int:
        windows = -(-self.longest // WINDOW)
        return min(windows * WINDOW, self.max_new_tokens)

    def decode_function(self) -> Callable[[], Tensor]:
        return CudaGraph(self.decode)
