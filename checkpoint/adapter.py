"""Adapters (lora/) in the format of PEFT: a folder with adapter_config.json and adapter_model.safetensors.

Ours opens in PEFT, and PEFT's opens here as far as it is LoRA of the decoder's linear layers; what it asks
for beyond that is refused by name. The tokenizer's files and the verification prompt travel with the
adapters.
"""
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint.config import load_config
from checkpoint.weights import (
    Rows,
    Stored,
    layout,
    list_problems,
    load_model,
    read_rows,
    read_slice,
    replacing,
    save_checkpoint,
    save_file,
    save_words,
    stored_tensors,
)
from lora import TARGETS, LoRA, initialize, lora_of
from model import Decoder, ModelConfig
from plumbing import ranks
from plumbing.errors import BadInput
from plumbing.files import expect, get_field, read_json, write_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's, before a Hugging Face name
MODULE = re.compile(r"\.layers\.\d+\.(\w+\.\w+)\.lora_[AB]\.weight")  # self_attn.q_proj, in a tensor's name

# Fields of adapter_config.json: those that are read, ...
READ = ("peft_type", "r", "lora_alpha", "use_rslora", "init_lora_weights")
# ... and those that change nothing in what the adapters compute. Which modules have some, the tensors tell.
WITHOUT_EFFECT = ("auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules",
                  "inference_mode", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size",
                  "revision", "target_modules", "task_type")
# Initialisations that leave the base's weights as they are; after others the adapters need another base
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


class Adapter(NamedTuple):
    """An adapter folder that fits a model."""
    lora: LoRA
    stored: dict[str, Stored]
    wanted: dict[str, Rows]  # where each of its tensors lies in the decoder


# -------------------------------------------------------------------------------- reading

def read_adapter(folder: str | Path, config: ModelConfig) -> Adapter:
    """What an adapter folder holds. Its modules may be any of a layer's linear ones, in all layers.

    Raises BadInput where a field or a tensor asks for what is not implemented, or does not fit the model.
    """
    lora = read_adapter_config(Path(folder) / CONFIG_FILE)
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise BadInput(f"{path}: no such file; save the adapter as safetensors (no pickle is opened)")
    stored = stored_tensors([path])
    every = adapter_layout(config, lora)
    modules = {module_of(name) for name in stored}
    wanted = {name: rows for name, rows in every.items() if module_of(name) in modules}
    problems = list_problems(wanted, stored)
    if problems or not stored:
        raise BadInput(f"{path}: does not fit {CONFIG_FILE} and the model ({problems or 'no tensors'}); "
                       "adapters of a layer's linear modules are read, those of the same in every layer")
    return Adapter(lora, stored, wanted)


def module_of(name: str) -> str | None:
    """The module that a tensor adapts, "mlp.up_proj"; None: of another kind of name."""
    found = MODULE.search(name)
    return found and found[1]


def read_adapter_config(path: Path) -> LoRA:
    """The rank and the scale of an adapter_config.json."""
    where = str(path)
    raw = expect(read_json(path), dict, where)
    if get_field(raw, "peft_type", str, where) != "LORA":
        raise BadInput(f"{where}: field 'peft_type': {raw['peft_type'][:40]!r} is not implemented; use LORA")
    for name, value in raw.items():
        is_read = name in READ or name in WITHOUT_EFFECT
        if name == "init_lora_weights" and value not in INITIALISATIONS:
            is_read = False
        if not is_read and value not in (None, False, "none") and value != {} and value != []:
            raise BadInput(f"{where}: field '{name}': {json.dumps(value)[:60]} is not implemented; "
                           "use an adapter without it, or merge it with PEFT")
    rank = get_field(raw, "r", int, where)
    alpha = get_field(raw, "lora_alpha", float, where)
    if rank < 1 or not 0 < alpha < 1e9:
        raise BadInput(f"{where}: fields 'r' and 'lora_alpha': {rank} and {alpha} are out of range; "
                       "correct them")
    rank_stabilized = expect(raw.get("use_rslora") or False, bool, f"{where}: field 'use_rslora'")
    return LoRA(rank, alpha, rank_stabilized=rank_stabilized)


def adapter_layout(config: ModelConfig, lora: LoRA) -> dict[str, Rows]:
    """PEFT's name -> its rows, for every tensor of adapters at `lora.targets`.

    Example, at rank 8: base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight
    -> (layers.0.attention.qkv.lora_A, 8, (8, 64)), ....lora_B.weight -> (....lora_B, 64, (32, 8)).
    """
    found = {}
    parts = Counter()  # of each linear layer, those before
    for name, rows in layout(config).items():
        path, _, kind = rows.parameter.rpartition(".")
        if kind != "weight" or path.rpartition(".")[2] not in lora.targets:
            continue
        n_rows, n_columns = rows.shape
        module = PREFIX + name.removesuffix(".weight")
        first = parts[path] * lora.rank
        found[f"{module}.lora_A.weight"] = Rows(f"{path}.lora_A", first, (lora.rank, n_columns))
        found[f"{module}.lora_B.weight"] = Rows(f"{path}.lora_B", rows.first, (n_rows, lora.rank))
        parts[path] += 1
    return found


@torch.no_grad()
def merge_adapter(model: Decoder, folder: str | Path) -> None:
    """Add to the weights what the adapters of a folder add: W + scale * B A, summed in fp32 at least."""
    lora, stored, wanted = read_adapter(folder, model.config)
    parameters = dict(model.named_parameters())
    for name, rows in wanted.items():
        if rows.parameter.endswith("lora_B"):
            b = read_slice(stored, name, 0, rows.shape[0])
            a = read_slice(stored, name.replace("lora_B", "lora_A"), 0, lora.rank)
            weight = parameters[rows.parameter.replace("lora_B", "weight")]
            part = weight[rows.first:rows.first + rows.shape[0]]
            part.copy_(part + (lora.scale * b @ a).to(part.device))


def load_for_sampling(folder: str | Path, adapter: str | None, dtype: torch.dtype, device: str,
                      context: int | None) -> Decoder:
    """The decoder with the folder's weights, and with what an adapter's folder adds to them."""
    model = load_model(folder, dtype, device, context=context)
    if adapter is not None:
        merge_adapter(model, adapter)
    return model


# -------------------------------------------------------------------------------- training

def load_for_training(folder: str | Path, device: str, context: int | None = None, lora: LoRA | None = None,
                      adapter: str | None = None, seed: int = 0) -> Decoder:
    """The decoder to train, cut over the ranks: all of it in fp32, or adapters in fp32 in a frozen decoder.

    A frozen decoder is in bf16 on CUDA, where its products run in bf16 anyhow, and in fp32 on the CPU.

    lora:    with new adapters, which depend on the seed alone
    adapter: with those of this folder
    """
    if adapter is not None:
        config = load_config(folder, context)
        read = read_adapter(adapter, config)
        lora = replace(read.lora, targets=whole_targets(read, config, adapter))
    dtype = torch.float32
    if lora is not None and torch.device(device).type == "cuda":
        dtype = torch.bfloat16
    model = load_model(folder, dtype, device, sharded=True, context=context, lora=lora)
    if adapter is not None:
        parameters = dict(model.named_parameters())
        for name, rows in read.wanted.items():
            read_rows(read.stored[name].path, name, rows, parameters[rows.parameter])
    elif lora is not None:
        initialize(model, seed)
    return model


def whole_targets(adapter: Adapter, config: ModelConfig, folder: str | Path) -> tuple[str, ...]:
    """The products with adapters. BadInput where one has them for some of its parts alone."""
    found = []
    for target in TARGETS:
        names = adapter_layout(config, replace(adapter.lora, targets=(target,)))
        is_there = {name in adapter.stored for name in names}
        if len(is_there) > 1:
            modules = sorted({module_of(name) for name in names})
            raise BadInput(f"{Path(folder) / WEIGHTS_FILE}: has adapters for some of {', '.join(modules)}, "
                           "and training needs them for all or none; begin new ones with --lora-rank")
        if True in is_there:
            found.append(target)
    return tuple(found)


# -------------------------------------------------------------------------------- saving

def save_adapter(folder: str | Path, model: Decoder, base: str | Path, prompt: str | None = None) -> None:
    """Write a decoder's adapters as PEFT does, with the tokenizer's files and the verification prompt.

    base: the folder of the weights without adapters, and of the tokenizer. Every rank must call this.
    """
    lora = lora_of(model)
    wanted = adapter_layout(model.config, lora)
    parameters = ranks.parameters(model)
    tensors = {}
    for name, rows in wanted.items():
        whole = ranks.whole(parameters[rows.parameter].detach())
        tensors[name] = whole[rows.first:rows.first + rows.shape[0]].contiguous().cpu()
    if ranks.rank():
        return
    with replacing(Path(folder)) as aside:
        save_words(aside, base, prompt)
        write_json(aside / CONFIG_FILE, adapter_config(lora, base, wanted))
        save_file(tensors, aside / WEIGHTS_FILE, metadata={"format": "pt"})


def adapter_config(lora: LoRA, base: str | Path, wanted: dict[str, Rows]) -> dict:
    """PEFT's adapter_config.json."""
    modules = {module_of(name).rpartition(".")[2] for name in wanted}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "use_rslora": lora.rank_stabilized,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def results(model: Decoder, base: str | Path, prompt: str | None, dtype: torch.dtype,
            merge: bool) -> dict[str, Callable[[Path], None]]:
    """What a training run ends in: the name of a folder -> what writes it.

    The whole model; of a model with adapters these alone, and with `merge` the whole model too.
    """
    def save_model(out: Path) -> None:
        save_checkpoint(out, model, base, prompt, dtype)

    def save_adapters(out: Path) -> None:
        save_adapter(out, model, base, prompt)

    if lora_of(model) is None:
        return {"model": save_model}
    return {"adapter": save_adapters} | ({"model": save_model} if merge else {})
