"""The reward of all steps of some solutions, against Transformers' `generate` and a second pass for P(Yes).

    python bench/reward.py --model FOLDER --data gsm8k.json
    python bench/reward.py --model FOLDER --data gsm8k.json --peers vllm llama.cpp                      # they do all steps in any case
    python bench/reward.py --model FOLDER --data gsm8k.json --steps 1 --peers vllm llama.cpp --repeats 5   # one case alone

Each side is the better of its dtypes. The peer goes as the official code does: one case at a time, K analyses, then one
full pass per analysis at batch size 1 that reads P(Yes). The end-of-text token is off, so that both sides write the
same number of tokens; as no analysis then has a verdict of its own, all read P(Yes) after an added verification line:
vLLM and llama.cpp by a request of one token each, for which they have the rest in their caches. Each side has loaded its
model and is warm, but has seen nothing of the prompts.
"""
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's modules; this folder is `bench`
import torch

from bench.common import (PeersConfig, Row, further_peers, in_turn, load_words, median_run, rows_of_further_peers,
                          run_side_or_all)
import fast
from checkpoint import DTYPES, load_model
from plumbing.cli import run
from formats.readers import read_solutions
from formats.verdicts import VERIFICATION
from generate import Engine
from rprm import Case, Sampler, Sampling, reward, yes_no_ids


@dataclass(frozen=True, kw_only=True)
class Config(PeersConfig):
    solutions: Annotated[int, "the first so many of the file", (1, None)] = 5
    steps: Annotated[int | None, "their first so many steps alone", (1, None)] = None
    k: Annotated[int, "analyses per step", (1, None)] = 10
    max_new_tokens: Annotated[int, "tokens per analysis", (1, None)] = 64
    dtypes: Annotated[tuple[str, ...], "dtypes that ours tries", ("float32", "bfloat16")] = ("float32", "bfloat16")
    peer_steps: Annotated[int, "how many of the steps the peer does", (1, None)] = 1
    full: Annotated[bool, "the peer does all steps"] = False


def main(config: Config) -> None:
    run_side_or_all(config, {"ours": ours, "plain": plain, "peer": peer, "vllm": vllm, "llama": llama}, measure)


def measure(config: Config) -> list[Row]:
    if config.full:
        config = replace(config, peer_steps=10 ** 6)
    sides = {f"ours, {dtype}": replace(config, side="ours", dtypes=(dtype,)) for dtype in config.dtypes}
    sides |= {f"plain, {dtype}": replace(config, side="plain", dtypes=(dtype,)) for dtype in config.dtypes}
    sides |= {f"peer, {dtype}": replace(config, side="peer", peer_dtypes=(dtype,)) for dtype in config.peer_dtypes}
    sides |= further_peers(config)
    found = in_turn(__file__, sides, config.repeats)
    medians = {name: median_run(runs, "steps_per_second") for name, runs in found.items()}
    (our_name, our), (_, plainly), (best_name, best) = (
        max(((name, m) for name, m in medians.items() if name.startswith(side)), key=lambda item: item[1]["steps_per_second"])
        for side in ("ours", "plain", "peer"))
    ratio, same = our["steps_per_second"] / best["steps_per_second"], best["steps"]
    note = (f"{our_name}: {our['steps']} steps in {our['seconds']:.1f} s; {best_name}, on {same} of them, {best['seconds']:.1f} s "
            f"({best['p_yes_seconds']:.1f} s of it the second pass); rewards of these steps (different draws): ours "
            f"{' '.join(f'{r:.2f}' for r in our['rewards'][:min(same, 5)])}, peer {' '.join(f'{r:.2f}' for r in best['rewards'][:5])}"
            + "; all: " + ", ".join(f"{name} {m['steps_per_second']:.3f}" for name, m in medians.items()))
    which = f"all steps of {config.solutions} solutions" if config.steps is None else f"the first steps alone ({our['steps']})"
    row = Row(f"reward of {which}, K={config.k}, {config.max_new_tokens} tokens", "steps/s",
              our["steps_per_second"], "≥ 10×", ratio >= 10, plainly["steps_per_second"], best["steps_per_second"], ratio, None,
              our["peak_mb"], best["peak_mb"], note, found)
    return [row, *rows_of_further_peers(row, medians, "steps_per_second")]


def cases_of(config: Config) -> list[Case]:
    found = [solution for _, solution in read_solutions(config.data)][:config.solutions]
    return [Case(s.problem, s.steps[:t], s.steps[t]) for s in found for t in range(len(s.steps))][:config.steps]


def ours(config: Config) -> dict:
    return timed(config, is_plain=False)


def plain(config: Config) -> dict:
    return timed(config, is_plain=True)


def timed(config: Config, is_plain: bool) -> dict:
    """The project's rewards, fast or as rprm.py, generate.py and model.py read."""
    tokenizer, prompt = load_words(config)
    [dtype] = config.dtypes
    model, cases = load_model(config.model, DTYPES[dtype]), cases_of(config)
    engine_class = Engine
    if not is_plain:
        fast.keep_freed_memory()
        engine_class = fast.for_sampling(model)

    def sampler(tokens: int) -> Sampler:
        sampling = Sampling(k=config.k, max_new_tokens=tokens, seed=config.seed)
        it = Sampler(model, tokenizer, prompt, sampling, engine_class)
        it.engine.eos = it.engine.eos[:0]  # end-of-text off
        return it
    list(sampler(2).analyses(cases[:1]))  # warm up
    it, rewards = sampler(config.max_new_tokens), [None] * len(cases)
    start = time.perf_counter()
    for i, analyses in it.analyses(cases):
        rewards[i] = reward(analyses)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "steps": len(cases), "steps_per_second": len(cases) / seconds, "rewards": rewards,
            "tokens": it.engine.new_tokens}


def peer(config: Config) -> dict:
    from bench.peer import generate, load, p_yes
    [dtype] = config.peer_dtypes
    tokenizer, prompt = load_words(config)
    model, cases = load(config.model, dtype), cases_of(config)[:config.peer_steps]
    prompts, line = [tokenizer.chat(prompt.fill(case)) for case in cases], tokenizer.encode("\n" + VERIFICATION)
    generate(model, prompts[:1], 2, 2, [], 0.95, 0.95)  # warm up
    torch.manual_seed(config.seed)
    second, rewards, start = 0.0, [], time.perf_counter()
    for ids in prompts:
        analyses = generate(model, [ids], config.k, config.max_new_tokens, [], 0.95, 0.95)
        then = time.perf_counter()
        found = [p_yes(model, ids + analysis + line, yes_no_ids(tokenizer)) for analysis in analyses]
        second += time.perf_counter() - then
        rewards.append(sum(found) / len(found))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "p_yes_seconds": second, "steps": len(cases), "steps_per_second": len(cases) / seconds, "rewards": rewards}


def vllm(config: Config) -> dict:
    from bench import peer_vllm
    [dtype] = config.peer_dtypes
    model = peer_vllm.load(config.model, dtype, config.vllm_compiled)
    found = further_peer(config, partial(peer_vllm.generate, model), partial(peer_vllm.p_yes, model))
    return found | {"peak_mb": peer_vllm.peak_mb()}


def llama(config: Config) -> dict:
    from bench import peer_llama
    model = peer_llama.Llama(config.model, torch.get_num_threads(), config.slots, config.slot_context)
    return further_peer(config, partial(peer_llama.generate, model), partial(peer_llama.p_yes, model))


def further_peer(config: Config, generate: Callable, p_yes: Callable) -> dict:
    """All steps at once: K analyses of each, then P(Yes) after each analysis."""
    tokenizer, prompt = load_words(config)
    prompts = [tokenizer.chat(prompt.fill(case)) for case in cases_of(config)]
    line, yes_no = tokenizer.encode("\n" + VERIFICATION), yes_no_ids(tokenizer)
    backwards = prompts[0][::-1]  # to warm up with: it shares nothing with the prompts
    generate([backwards], config.k, 4, [], 0.95, 0.95)
    p_yes([backwards + line], yes_no)
    start = time.perf_counter()
    analyses = generate(prompts, config.k, config.max_new_tokens, [], 0.95, 0.95)
    then = time.perf_counter()
    found = p_yes([ids + analysis + line for ids, own in zip(prompts, analyses) for analysis in own], yes_no)
    rewards = [sum(found[i:i + config.k]) / config.k for i in range(0, len(found), config.k)]
    end = time.perf_counter()
    return {"seconds": end - start, "p_yes_seconds": end - then, "steps": len(prompts), "steps_per_second": len(prompts) / (end - start),
            "rewards": rewards, "tokens": sum(len(analysis) for own in analyses for analysis in own)}


if __name__ == "__main__":
    run((Config, main))
