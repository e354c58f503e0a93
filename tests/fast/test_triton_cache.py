"""The kernel for decoding's attention on a GPU against fast.cache.Cache; without a GPU, in Triton's interpreter.

The interpreter multiplies bf16 wrongly, so there is fp16 there.
"""
import os
import subprocess
import sys

import pytest
import torch

ON_GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="pip install -r requirements-dev.txt")

import fast
import fast.engine
import generate
from checkpoint import load_model
from conftest import ROOT
from fast.cache import Cache
from fast.triton_cache import TritonCache
from test_generate import EOS, YES_NO, assert_same, requests_of, run, shared_prompts


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-6), (torch.bfloat16, 3e-2) if ON_GPU else (torch.float16, 3e-3)])
@pytest.mark.parametrize("prefix, prompts", [(70, [5, 64, 65, 200]), (0, [130, 3]), (3, [90])])
def test_the_kernel_is_the_attention_of_the_cache(make_folder, family, dtype, close, prefix, prompts):
    """Prompts in buckets of several lengths, with different numbers of rows; rows of different lengths."""
    device = torch.device("cuda" if ON_GPU else "cpu")
    model = load_model(make_folder(family, False)).to(device, dtype)
    c = model.config
    layers, KV, D = c.num_hidden_layers, c.num_key_value_heads, c.head_dim
    rows_of = [1, 4, 2, 10][:len(prompts)]
    request_ids = torch.tensor([i for i, n in enumerate(rows_of) for _ in range(n)])
    request_ids = request_ids[torch.randperm(len(request_ids))].to(device)
    R = len(request_ids)
    last = torch.randint(0, 150, (R,)).to(device)
    width = int(last.max()) + 1
    found = []
    for kind in (Cache, TritonCache):
        generator = torch.Generator().manual_seed(0)
        cache = kind(model)
        cache.prefix = torch.randn(2, layers, KV, prefix, D, generator=generator).to(device, dtype)
        for i, n in enumerate(prompts):
            cache.add_prompt(i, torch.randn(2, layers, KV, n, D, generator=generator).to(device, dtype))
        cache.make_room(R, width)
        cache.rows[:, :, :R, :, :width] = torch.randn(2, layers, R, KV, width, D, generator=generator).to(device, dtype)
        cache.arrange(request_ids)
        cache.begin_step(last, width)
        q = torch.randn(R, c.num_attention_heads, D, generator=generator).to(device, dtype)
        found.append(torch.stack([cache.attend(layer, q) for layer in range(layers)]).float())
    expected, ours = found
    assert expected.std() > 0.05
    torch.testing.assert_close(ours, expected, rtol=close, atol=close)


@pytest.mark.skipif(ON_GPU, reason="for Triton's interpreter")
def test_an_engine_samples_the_same_with_it(make_folder, monkeypatch):
    """Rows branch, end and are replaced by those of other prompts."""
    model = fast.speed_up(load_model(make_folder("qwen2", True)))
    requests = requests_of(shared_prompts(4), 2)  # on the CPU: tests/test_cuda.py has the engine that is for a GPU
    expected = run(generate.Engine(model, EOS, YES_NO, 0.5, 0.95, 5, 4), requests)
    monkeypatch.setattr(fast.engine.Engine, "new_cache", lambda self: TritonCache(self.model))
    assert_same(run(fast.engine.Engine(model, EOS, YES_NO, 0.5, 0.95, 5, 4), requests), expected)


COMPILE = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fast.triton_cache import attend_kernel, options_for

LETTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
for dtype in LETTERS:
    for D in (8, 128, 256):
        options = options_for(D, dtype, 1000)
        stages = options.pop("num_stages")
        constants = {"H": 28, "G": 7, "D": D, "IS_BEGUN": True} | options
        types = dict.fromkeys(("q", "out", "keys", "values"), LETTERS[dtype])
        types |= dict.fromkeys(("before", "lse"), "*fp32")
        types |= dict.fromkeys(("order", "first", "count", "length"), "*i64")
        types |= {"scale": "fp32", "group_stride": "i64", "head_stride": "i64"}
        types |= dict.fromkeys(constants, "constexpr")
        names = attend_kernel.arg_names
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name] != "constexpr"}
        source = ASTSource(attend_kernel, {name: types[name] for name in names},
                           {(names.index(name),): value for name, value in constants.items()}, aligned)
        kernel = triton.compile(source, target=GPUTarget("cuda", 86, 32), options={"num_stages": stages})
        print(kernel.metadata.shared)
"""


@pytest.mark.slow
def test_the_kernel_fits_the_shared_memory_of_a_card_of_24_gb():
    """Compiled for one as far as it goes without a GPU, in fp32 and bf16, for heads of 8, 128 and 256."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    used = [int(line) for line in done.stdout.split()]
    assert len(used) == 6 and max(used) <= 101_376, used
