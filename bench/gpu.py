"""On a GPU: what share of it training, sampling and prefill use, at the shapes of real models, with random weights.

    python bench/gpu.py --shape 7b --out 7b.json     # one 141 GB card: fp32 weights, gradients and moments of 7B take 122 GB
    python bench/gpu.py --shape 7b --what lora --micro-tokens 4096
    python bench/gpu.py --shape 0.5b --what sft dpo attention sample plain peer reward
    python bench/gpu.py --shape tiny --device cpu    # the same lines in miniature

Prompts have 700 tokens, of which 500 are the same instructions, and responses 600. FLOPs count every token of a tree once,
response tokens alone at the head, and no recomputation; FLOP/s and bandwidth of the card are measured in the same run.
Weights are random, but scaled so that the next token is about as uncertain as a trained model's: top-p looks at a few tokens.
Times are medians after a run to warm up. The peer is Transformers' `generate`; it and the plain engine have one batch, as large
as fits.
"""
import gc
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's modules; this folder is `bench`
import numpy as np
import torch

from bench.common import Clock, seconds_of, surroundings
from plumbing.cli import LOWER_IF_MEMORY_RUNS_OUT, print_config, run
from plumbing.files import write_json
from plumbing.memory import memory
import fast
from checkpoint.scratch import init_weights
from fast.flex import FlexTreeAttention, MaskedTreeAttention, compiled_flex_attention
from fast.fused import fused
import generate
from generate import Engine, Request
from lora import LoRA, add_adapters, initialize
from model import Decoder, ModelConfig, Tree
from rprm import dpo_loss, response_logprobs, sft_loss
from plumbing.run import precision
from plumbing.queues import answers_of

QWEN = dict(model_type="qwen2", rms_norm_eps=1e-6, rope_theta=1e6, rope_scaling=None, max_position_embeddings=32768, qkv_bias=True,
            qk_norm=False)
SHAPES = {
    "7b": ModelConfig(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                      num_key_value_heads=4, head_dim=128, tie_word_embeddings=False, **QWEN),
    "0.5b": ModelConfig(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                        num_key_value_heads=2, head_dim=64, tie_word_embeddings=True, **QWEN),
    "tiny": ModelConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, **QWEN),
}
INSTRUCTIONS, PROMPT, RESPONSE = 500, 700, 600  # tokens; the prompt has the instructions in it
STEPS = 5  # of a solution
SPREAD = 8.0  # standard deviation of the logits: the likeliest of 150,000 tokens has about half of the probability
LORA = LoRA(rank=16, alpha=32)
WORK = ("sft", "dpo", "lora", "attention", "sample", "plain", "peer", "reward")


@dataclass(frozen=True, kw_only=True)
class Config:
    shape: Annotated[str, "the model's shape: Qwen2.5's, or one for a laptop", tuple(SHAPES)] = "0.5b"
    what: Annotated[tuple[str, ...], "what to measure", WORK] = WORK
    micro_tokens: Annotated[int, "tokens of a tree", (64, None), LOWER_IF_MEMORY_RUNS_OUT] = 8192
    trees: Annotated[int, "trees per optimizer step", (1, None)] = 4
    steps: Annotated[int, "timed optimizer steps", (1, None)] = 5
    prompts: Annotated[int, "prompts that are sampled side by side (the peer: at most)", (1, None)] = 64
    k: Annotated[int, "continuations of each", (1, None)] = 10
    solutions: Annotated[int, "solutions that are scored in bulk", (1, None)] = 32
    repeats: Annotated[int, "timed runs of the sampling", (1, None)] = 3
    scale: Annotated[float, "of the lengths above, for a laptop", (0.01, 1)] = 1.0
    checkpoint_activations: Annotated[bool, "recompute each layer in the backward pass"] = True
    device: Annotated[str, "where to run"] = "cuda"
    out: Annotated[str | None, "file for the figures, as JSON"] = None


def main(config: Config) -> None:
    print_config(config)
    peak = {"flops": measured_flops(config), "bandwidth": measured_bandwidth(config)}
    print(f"measured: {peak['flops'] / 1e12:.3g} TFLOP/s (bf16 product), {peak['bandwidth'] / 1e9:.4g} GB/s (copy)")
    rows = []
    for what in config.what:
        compiled_flex_attention.cache_clear()
        fused.cache_clear()  # what was compiled for the work before
        torch._dynamo.reset()
        gc.collect()  # its model is part of cycles
        if is_cuda(config):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        measure = {"sft": train, "dpo": train, "lora": train, "attention": attention, "sample": sample, "plain": plain, "peer": peer,
                   "reward": reward_in_bulk}[what]
        rows.append({"work": what, "shape": config.shape} | measure(config, what, peak) | {"peak memory, GB": peak_gb(config)})
        shown = {name: format(value, ".4g") if isinstance(value, float) else value for name, value in rows[-1].items()}
        print("\n" + "\n".join(f"{name:<40} {value}" for name, value in shown.items()))
        if config.out:
            about = surroundings(0) | {"device": device_name(config), "config": asdict(config), "measured": peak}
            write_json(config.out, about | {"rows": rows})


# ---------------------------------------------------------------------------------------------- the card

def device_name(config: Config) -> str:
    return torch.cuda.get_device_name() if is_cuda(config) else "cpu"


def is_cuda(config: Config) -> bool:
    return torch.device(config.device).type == "cuda"


def seconds(config: Config, work: Callable, repeats: int) -> float:
    """The median time of `work`, after one run to warm up."""
    def whole():
        work()
        synchronize(config)
    return seconds_of(whole, repeats)


def synchronize(config: Config) -> None:
    if is_cuda(config):
        torch.cuda.synchronize()


def measured_flops(config: Config) -> float:
    """FLOP/s of one large bf16 product: what the tensor cores really give."""
    n = 8192 if is_cuda(config) else 256
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=config.device) for _ in range(2))
    return 2 * n ** 3 / seconds(config, lambda: a @ b, 10)


def measured_bandwidth(config: Config) -> float:
    """Bytes per second of a copy, read and written."""
    a = torch.empty(2 ** (30 if is_cuda(config) else 22), dtype=torch.uint8, device=config.device)
    b = torch.empty_like(a)
    return 2 * len(a) / seconds(config, lambda: b.copy_(a), 10)


def peak_gb(config: Config) -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if is_cuda(config) else float("nan")


# ---------------------------------------------------------------------------------------------- the work

def random_model(config: Config, dtype: torch.dtype) -> Decoder:
    with torch.device("meta"):
        model = Decoder(SHAPES[config.shape]).to(dtype)
    model.to_empty(device=config.device)
    init_weights(model, torch.Generator(config.device).manual_seed(0))
    with torch.no_grad():
        model.norm.weight.fill_(SPREAD / (model.config.initializer_range * model.config.hidden_size ** 0.5))
    model.checkpoint_activations = config.checkpoint_activations
    return model


def lengths(config: Config) -> tuple[int, int, int]:
    return tuple(max(2, round(n * config.scale)) for n in (INSTRUCTIONS, PROMPT, RESPONSE))


def flops_of_forward(shape: ModelConfig, tree: Tree, heads: int) -> float:
    """Of a tree's forward pass, with `heads` tokens at the LM head; a backward pass has twice as many."""
    attention, mlp = shape.num_attention_heads * shape.head_dim, 3 * shape.hidden_size * shape.intermediate_size
    linear = shape.hidden_size * (2 * attention + 2 * shape.num_key_value_heads * shape.head_dim) + mlp
    seen = float((tree.positions + 1).sum())  # keys that the tokens see
    per_layer = 2 * len(tree) * linear + 4 * seen * attention
    return per_layer * shape.num_hidden_layers + 2 * heads * shape.hidden_size * shape.vocab_size


def random_trees(config: Config, responses: int) -> list[tuple[Tree, list[int]]]:
    """Trees of at most micro_tokens: prompts below the same instructions, each with so many responses."""
    instructions, prompt, response = lengths(config)
    rng, vocab = np.random.default_rng(0), SHAPES[config.shape].vocab_size
    shared = rng.integers(vocab, size=instructions).tolist()
    n = max(1, (config.micro_tokens - instructions) // (prompt - instructions + responses * response))
    trees = []
    for _ in range(config.trees):
        own = [shared + rng.integers(vocab, size=prompt - instructions).tolist() for _ in range(n)]
        sequences = [p + rng.integers(vocab, size=response).tolist() for p in own for _ in range(responses)]
        trees.append((Tree(sequences), [prompt] * len(sequences)))
    return trees


def train(config: Config, what: str, peak: dict) -> dict:
    """Utilisation of an optimizer step of SFT, full or of adapters, or of DPO; the reference's pass is part of DPO's work, and of its FLOPs.
    """
    model = random_model(config, torch.bfloat16 if what == "lora" and is_cuda(config) else torch.float32)
    if what == "lora":
        add_adapters(model, LORA)
        initialize(model, seed=0)
    fast.speed_up(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)
    trees = random_trees(config, 2 if what == "dpo" else 1)
    responses = [sum(len(path) - start for path, start in zip(tree.paths, starts)) for tree, starts in trees]  # tokens of each tree
    work = sum(flops_of_forward(model.config, tree, n) for (tree, _), n in zip(trees, responses))
    trees = [(tree.to(config.device), starts) for tree, starts in trees]

    def step():
        for tree, starts in trees:
            if what == "dpo":
                with torch.no_grad(), precision(config.device):
                    reference = response_logprobs(model, tree, starts).view(-1, 2)
            with precision(config.device):
                logprobs = response_logprobs(model, tree, starts)
            if what == "dpo":
                chosen, rejected = logprobs.view(-1, 2).unbind(1)
                loss = dpo_loss(chosen, rejected, *reference.unbind(1), torch.ones_like(chosen), 0.1)[0].mean()
            else:
                loss = sft_loss(logprobs, sum(responses))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    took = seconds(config, step, config.steps)
    passes = {"sft": 3, "dpo": 4, "lora": 2}[what]  # a pass back through frozen weights has one product, and not two
    tokens = sum(len(tree) for tree, _ in trees)
    table = memory(model.config, config.micro_tokens, config.checkpoint_activations, config.device, 1, LORA if what == "lora" else None)
    return {"seconds per optimizer step": took, "tokens in trees": tokens, "tokens/s": tokens / took,
            "model FLOP utilisation": passes * work / took / peak["flops"],
            "peak memory as the scripts foretell it, GB": sum(table.values()) / 1e9}


def attention(config: Config, _: str, peak: dict) -> dict:
    """The attention of one layer over one tree, with its backward pass (on a GPU), through flex_attention and through SDPA with the whole mask."""
    [tree, _], *_ = random_trees(config, 1)
    shape, dtype = SHAPES[config.shape], torch.bfloat16 if is_cuda(config) else torch.float32
    q, k, v = (torch.randn(len(tree), heads, shape.head_dim, dtype=dtype, device=config.device, requires_grad=is_cuda(config))
               for heads in (shape.num_attention_heads, shape.num_key_value_heads, shape.num_key_value_heads))
    flops = 4 * float((tree.positions + 1).sum()) * shape.num_attention_heads * shape.head_dim * (3 if is_cuda(config) else 1)
    row = {}
    for name, kind in (("flex_attention", FlexTreeAttention), ("SDPA, the whole mask", MaskedTreeAttention)):
        attend = kind(tree.end.to(config.device))

        def work():
            out = attend(0, q, k, v)
            if out.requires_grad:
                torch.autograd.grad(out.sum(), (q, k, v))
        took = seconds(config, work, 10)
        row |= {f"{name}, seconds": took, f"{name}, share of FLOP/s": flops / took / peak["flops"]}
    return row


def random_requests(config: Config) -> list[Request]:
    """--prompts prompts below the same instructions, --k continuations of each."""
    instructions, prompt, _ = lengths(config)
    rng, vocab = np.random.default_rng(1), SHAPES[config.shape].vocab_size
    shared = rng.integers(vocab, size=instructions).tolist()
    return [Request(shared + rng.integers(vocab, size=prompt - instructions).tolist(), list(range(i * config.k, (i + 1) * config.k)))
            for i in range(config.prompts)]


def engine_of(config: Config, model: Decoder, new_tokens: int) -> Engine:
    """With the paper's settings; the end-of-text token is off."""
    return fast.engine_for(model)(model, [], (1, 2), 0.95, 0.95, new_tokens, config.prompts * config.k)


def timed_run(config: Config, model: Decoder, requests: list[Request]) -> tuple[float, float, Engine]:
    """Seconds of prefill, seconds of all else, and the engine that did it."""
    engine, prefill = engine_of(config, model, lengths(config)[2]), Clock()
    prefill_waiting = engine.prefill_waiting

    def timed():
        synchronize(config)  # what came before is not prefill
        with prefill:
            prefill_waiting()
            synchronize(config)
    engine.prefill_waiting = timed
    start = time.perf_counter()
    for _ in answers_of(engine, requests):
        pass
    synchronize(config)
    return prefill.seconds, time.perf_counter() - start - prefill.seconds, engine


def sample(config: Config, _: str, peak: dict) -> dict:
    """Prefill FLOP/s, and decoding against its roofline."""
    model, requests = fast.speed_up(random_model(config, torch.bfloat16)), random_requests(config)
    response, shape, rows = lengths(config)[2], model.config, config.prompts * config.k
    list(answers_of(engine_of(config, model, 2), requests))  # warm up
    before, took, engines = zip(*(timed_run(config, model, requests) for _ in range(config.repeats)))
    before, took = statistics.median(before), statistics.median(took)
    weights = sum(p.numel() for p in model.parameters()) - (0 if shape.tie_word_embeddings else model.embed.weight.numel())
    all_prompts = weights - shape.hidden_size * shape.vocab_size  # the head: the last tokens alone
    return {"rows": rows, "tokens/s": rows * response / (before + took), "decode tokens/s": rows * (response - 1) / took,
            "decode, share of the roofline": roofline(config, weights, peak) / took, "prefill seconds": before,
            "prefill, share of FLOP/s": 2 * engines[0].prefill_tokens * all_prompts / before / peak["flops"]}


def roofline(config: Config, weights: int, peak: dict) -> float:
    """The seconds that decoding takes at the least: each step as long as its bytes (weights, keys and values, bf16) or its FLOPs take."""
    (instructions, prompt, response), shape, rows = lengths(config), SHAPES[config.shape], config.prompts * config.k
    per_token = 2 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim  # bytes of keys and values
    cached = instructions + config.prompts * (prompt - instructions)  # read by each step
    return sum(max((2 * weights + per_token * (cached + rows * t)) / peak["bandwidth"], 2 * weights * rows / peak["flops"])
               for t in range(1, response))


def plain(config: Config, _: str, peak: dict) -> dict:
    """The plain engine on a part of the same work."""
    model = random_model(config, torch.bfloat16)

    def sample_batch(requests: list[Request], new_tokens: int) -> None:
        generate.Engine(model, [], (1, 2), 0.95, 0.95, new_tokens).generate(requests)
    return one_batch(config, sample_batch)


def peer(config: Config, _: str, peak: dict) -> dict:
    """Transformers' `generate` on a part of the same work."""
    from transformers import AutoModelForCausalLM, Qwen2Config
    from bench.peer import generate
    shape = SHAPES[config.shape]
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "rms_norm_eps", "rope_theta", "tie_word_embeddings", "max_position_embeddings")
    with torch.device(config.device):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**{name: getattr(shape, name) for name in names}), dtype=torch.bfloat16,
                                                 attn_implementation="sdpa").eval()

    def sample_batch(requests: list[Request], new_tokens: int) -> None:
        generate(model, [request.ids for request in requests], config.k, new_tokens, [], 0.95, 0.95)
    return one_batch(config, sample_batch)


def one_batch(config: Config, sample_batch: Callable) -> dict:
    """What samples in batches, with as many of the prompts as fit into memory, or halves of them. One run of each length."""
    requests, response = random_requests(config), lengths(config)[2]

    def took(new_tokens: int) -> float:
        synchronize(config)
        start = time.perf_counter()
        sample_batch(requests, new_tokens)
        synchronize(config)
        return time.perf_counter() - start
    while True:
        try:
            took(2)  # warm up
            first, whole = took(1), took(response)
            break
        except torch.OutOfMemoryError:
            requests = requests[:len(requests) // 2]  # with none left, the next try fails
        gc.collect()
        torch.cuda.empty_cache()
    rows = len(requests) * config.k
    return {"rows": rows, "tokens/s": rows * response / whole, "decode tokens/s": rows * (response - 1) / (whole - first)}


def reward_in_bulk(config: Config, _: str, peak: dict) -> dict:
    """The reward of all steps of --solutions solutions: a step's prompt has the problem and the steps before it, 700 tokens on average."""
    model = fast.speed_up(random_model(config, torch.bfloat16))
    instructions, prompt, response = lengths(config)
    rng, vocab, own = np.random.default_rng(2), model.config.vocab_size, prompt - instructions
    step = max(1, own // (STEPS + 1))  # tokens of a step; the problem has about half of the prompt's own
    shared, requests = rng.integers(vocab, size=instructions).tolist(), []
    for _ in range(config.solutions):
        solution = shared + rng.integers(vocab, size=own + step * (STEPS - 1) // 2).tolist()
        for left in reversed(range(STEPS)):
            requests.append(Request(solution[:len(solution) - step * left], rng.integers(2 ** 62, size=config.k).tolist()))
    list(answers_of(engine_of(config, model, 2), requests))  # warm up
    engine = engine_of(config, model, response)
    start = time.perf_counter()
    rewards = {i: statistics.mean(c.p_yes[-1] for c in continuations) for i, continuations in answers_of(engine, requests)}
    took = time.perf_counter() - start
    return {"solutions": config.solutions, "steps": len(rewards), "seconds per solution": took / config.solutions,
            "tokens/s": engine.new_tokens / took, "prompt tokens computed / their sum": engine.prefill_tokens / engine.prompt_tokens}


if __name__ == "__main__":
    run((Config, main))
