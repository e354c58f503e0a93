"""On a GPU: what share of it training, sampling and prefill use, at the shapes of real models, with random weights.

    python bench/gpu.py --shape 7b          # one 141 GB card: fp32 weights, gradients and moments of 7B take 122 GB
    python bench/gpu.py --shape 0.5b --what sft dpo sample
    python bench/gpu.py --shape tiny --device cpu    # the same lines in miniature

Prompts have 700 tokens, of which 500 are the same instructions, and responses 600. FLOPs count every token of a tree once,
response tokens alone at the head, and no recomputation; FLOP/s and bandwidth of the card are measured in the same run.
"""
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's modules; this folder is `bench`
import numpy as np
import torch

from bench.common import Clock, surroundings
from cli import print_config, run, write_json
from generate import Engine, Request
from model import Decoder, ModelConfig, Tree
from rprm import dpo_loss, response_logprobs, sft_loss
from training import precision

QWEN = dict(model_type="qwen2", rms_norm_eps=1e-6, rope_theta=1e6, rope_scaling=None, max_position_embeddings=32768, qkv_bias=True, qk_norm=False)
SHAPES = {
    "7b": ModelConfig(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                      num_key_value_heads=4, head_dim=128, tie_word_embeddings=False, **QWEN),
    "0.5b": ModelConfig(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                        num_key_value_heads=2, head_dim=64, tie_word_embeddings=True, **QWEN),
    "tiny": ModelConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, **QWEN),
}
INSTRUCTIONS, PROMPT, RESPONSE = 500, 700, 600  # tokens; the prompt has the instructions in it


@dataclass(frozen=True, kw_only=True)
class Config:
    shape: Annotated[str, "the model's shape: Qwen2.5's, or one for a laptop", tuple(SHAPES)] = "0.5b"
    what: Annotated[tuple[str, ...], "what to measure", ("sft", "dpo", "sample")] = ("sft", "dpo", "sample")
    micro_tokens: Annotated[int, "tokens of a tree", (64, None)] = 8192
    trees: Annotated[int, "trees per optimizer step", (1, None)] = 4
    steps: Annotated[int, "timed optimizer steps", (1, None)] = 5
    prompts: Annotated[int, "prompts that are sampled side by side", (1, None)] = 64
    k: Annotated[int, "continuations of each", (1, None)] = 10
    scale: Annotated[float, "of the lengths above, for a laptop", (0.01, 1)] = 1.0
    checkpoint_activations: Annotated[bool, "recompute each layer in the backward pass"] = True
    device: Annotated[str, "where to run"] = "cuda"
    out: Annotated[str | None, "file for the figures, as JSON"] = None


def main(config: Config) -> None:
    print_config(config)
    peak = {"flops": measured_flops(config), "bandwidth": measured_bandwidth(config)}
    print(f"measured: {peak['flops'] / 1e12:.3g} TFLOP/s (bf16 product), {peak['bandwidth'] / 1e9:.4g} GB/s (copy)")
    rows = [{"sft": train, "dpo": train, "sample": sample}[what](config, what, peak) for what in config.what]
    for row in rows:
        print("\n" + "\n".join(f"{name:<34} {value:.4g}" if isinstance(value, float) else f"{name:<34} {value}" for name, value in row.items()))
    if config.out:
        write_json(config.out, surroundings(0) | {"device": device_name(config), "config": asdict(config), "measured": peak, "rows": rows})


# ---------------------------------------------------------------------------------------------- the card

def device_name(config: Config) -> str:
    return torch.cuda.get_device_name() if is_cuda(config) else "cpu"


def is_cuda(config: Config) -> bool:
    return torch.device(config.device).type == "cuda"


def seconds(config: Config, work: Callable, repeats: int) -> float:
    """The time of `repeats` runs of `work`, after one to warm up."""
    work()
    synchronize(config)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(config)
    return time.perf_counter() - start


def synchronize(config: Config) -> None:
    if is_cuda(config):
        torch.cuda.synchronize()


def measured_flops(config: Config) -> float:
    """FLOP/s of one large bf16 product: what the tensor cores really give."""
    n = 8192 if is_cuda(config) else 256
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=config.device) for _ in range(2))
    return 10 * 2 * n ** 3 / seconds(config, lambda: a @ b, 10)


def measured_bandwidth(config: Config) -> float:
    """Bytes per second of a copy, read and written."""
    a = torch.empty(2 ** (30 if is_cuda(config) else 22), dtype=torch.uint8, device=config.device)
    b = torch.empty_like(a)
    return 10 * 2 * len(a) / seconds(config, lambda: b.copy_(a), 10)


def peak_gb(config: Config) -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if is_cuda(config) else float("nan")


# ---------------------------------------------------------------------------------------------- the work

def random_model(config: Config, dtype: torch.dtype) -> Decoder:
    with torch.device("meta"):
        model = Decoder(SHAPES[config.shape]).to(dtype)
    model.to_empty(device=config.device)
    model.init_weights(torch.Generator(config.device).manual_seed(0))
    model.checkpoint_activations = config.checkpoint_activations
    return model


def lengths(config: Config) -> tuple[int, int, int]:
    return tuple(max(2, round(n * config.scale)) for n in (INSTRUCTIONS, PROMPT, RESPONSE))


def flops_of_forward(shape: ModelConfig, tree: Tree, heads: int) -> float:
    """Of a tree's forward pass, with `heads` tokens at the LM head; a backward pass has twice as many."""
    attention, mlp = shape.num_attention_heads * shape.head_dim, 3 * shape.hidden_size * shape.intermediate_size
    linear = shape.hidden_size * (2 * attention + 2 * shape.num_key_value_heads * shape.head_dim) + mlp
    seen = float((tree.positions + 1).sum())  # keys that the tokens see
    return 2 * len(tree) * linear * shape.num_hidden_layers + 4 * seen * attention * shape.num_hidden_layers \
        + 2 * heads * shape.hidden_size * shape.vocab_size


def random_trees(config: Config, responses: int) -> list[tuple[Tree, list[int]]]:
    """Trees of at most micro_tokens: prompts below the same instructions, each with so many responses."""
    instructions, prompt, response = lengths(config)
    rng, vocab = np.random.default_rng(0), SHAPES[config.shape].vocab_size
    shared = rng.integers(vocab, size=instructions).tolist()
    n = max(1, (config.micro_tokens - instructions) // (prompt - instructions + responses * response))
    trees = []
    for _ in range(config.trees):
        own = [shared + rng.integers(vocab, size=prompt - instructions).tolist() for _ in range(n)]
        trees.append((Tree([p + rng.integers(vocab, size=response).tolist() for p in own for _ in range(responses)]), [prompt] * n * responses))
    return trees


def train(config: Config, what: str, peak: dict) -> dict:
    """Utilisation of an optimizer step of SFT or DPO; the reference's pass is part of DPO's work, and of its FLOPs."""
    model = random_model(config, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    trees = random_trees(config, 1 if what == "sft" else 2)
    responses = [sum(len(path) - start for path, start in zip(tree.paths, starts)) for tree, starts in trees]  # tokens of each tree
    work = sum(flops_of_forward(model.config, tree, n) for (tree, _), n in zip(trees, responses))
    trees = [(tree.to(config.device), starts) for tree, starts in trees]

    def step():
        for tree, starts in trees:
            if what == "dpo":
                with torch.no_grad(), precision(config):
                    reference = response_logprobs(model, tree, starts).view(-1, 2)
            with precision(config):
                logprobs = response_logprobs(model, tree, starts)
            if what == "sft":
                loss = sft_loss(logprobs, sum(responses))
            else:
                chosen, rejected = logprobs.view(-1, 2).unbind(1)
                loss = dpo_loss(chosen, rejected, *reference.unbind(1), torch.ones_like(chosen), 0.1)[0].mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    took = seconds(config, step, config.steps) / config.steps
    flops = work * (3 if what == "sft" else 4)
    tokens = sum(len(tree) for tree, _ in trees)
    return {"work": what, "shape": config.shape, "seconds per optimizer step": took, "tokens in trees": tokens, "tokens/s": tokens / took,
            "model FLOP utilisation": flops / took / peak["flops"], "peak memory, GB": peak_gb(config)}


def sample(config: Config, _: str, peak: dict) -> dict:
    """Prefill FLOP/s and decoding against its roofline: the time that a step's bytes or FLOPs take at the least."""
    dtype = torch.bfloat16
    model = random_model(config, dtype)
    instructions, prompt, response = lengths(config)
    rng, shape, rows = np.random.default_rng(1), model.config, config.prompts * config.k
    shared = rng.integers(shape.vocab_size, size=instructions).tolist()
    requests = [Request(shared + rng.integers(shape.vocab_size, size=prompt - instructions).tolist(), list(range(i * config.k, (i + 1) * config.k)))
                for i in range(config.prompts)]
    engine, prefill = Engine(model, [], (1, 2), 0.95, 0.95, response, rows), Clock()
    plain = engine._prefill

    def timed(waiting):
        with prefill:
            found = plain(waiting)
            synchronize(config)
        return found
    engine._prefill = timed
    start = time.perf_counter()
    for _ in engine.run(requests):
        pass
    synchronize(config)
    took = time.perf_counter() - start - prefill.seconds
    weights = sum(p.numel() for p in model.parameters()) - (0 if shape.tie_word_embeddings else model.embed.weight.numel())
    per_token = 2 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim  # bytes of keys and values, bf16
    cached = instructions + config.prompts * (prompt - instructions)  # read by each step
    least = sum(max((2 * weights + per_token * (cached + rows * t)) / peak["bandwidth"], 2 * weights * rows / peak["flops"])
                for t in range(1, response))
    tree_flops = 2 * engine.prefill_tokens * weights
    return {"work": "sample", "shape": config.shape, "rows": rows, "decode tokens/s": rows * (response - 1) / took,
            "decode, share of the roofline": least / took, "prefill seconds": prefill.seconds,
            "prefill, share of FLOP/s": tree_flops / prefill.seconds / peak["flops"], "peak memory, GB": peak_gb(config)}


if __name__ == "__main__":
    run((Config, main))
