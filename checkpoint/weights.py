"""The weights: safetensors, streamed in tensor by tensor, and written so that Transformers and vLLM open them."""
import math
import os
import re
import shutil
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Iterator

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from checkpoint.config import config_to_json, load_config
from checkpoint.tokenizer import load_tokenizer
from model import Decoder, ModelConfig
from plumbing import ranks
from plumbing.errors import BadInput
from plumbing.files import expect, get_field, read_json, write_json

SHARD_BYTES = 5_000_000_000
READ_BYTES = 16_000_000  # a file is mapped piece by piece, so that loading peaks little above the weights themselves
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json")
PROMPT_FILE = "verification_prompt.txt"  # the words a checkpoint was trained with travel with it

# our parameter -> the Hugging Face tensors that stand in it, one above the other
NAMES = {
    "embed.weight": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
}
LAYER_NAMES = {
    "attention_norm.weight": ("input_layernorm.weight",),
    "attention.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attention.qkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "attention.q_norm.weight": ("self_attn.q_norm.weight",),
    "attention.k_norm.weight": ("self_attn.k_norm.weight",),
    "attention.out.weight": ("self_attn.o_proj.weight",),
    "mlp_norm.weight": ("post_attention_layernorm.weight",),
    "mlp.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.down.weight": ("mlp.down_proj.weight",),
}


def tensor_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Our parameter's name -> the Hugging Face tensors stacked in it, for every parameter that this config has."""
    with torch.device("meta"):
        parameters = dict(Decoder(config).named_parameters())
    names = dict(NAMES)
    for i in range(config.num_hidden_layers):
        names |= {f"layers.{i}.{ours}": tuple(f"model.layers.{i}.{t}" for t in theirs) for ours, theirs in LAYER_NAMES.items()}
    return {name: names[name] for name in parameters}


def part_shapes(config: ModelConfig, name: str, shape: torch.Size) -> list[tuple[int, ...]]:
    """The shapes of the Hugging Face tensors that are stacked in parameter `name` of `shape`."""
    if ".qkv." in name:
        rows = [n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)]
    elif ".gate_up." in name:
        rows = [config.intermediate_size] * 2
    else:
        rows = [shape[0]]
    return [(n, *shape[1:]) for n in rows]


def layout(config: ModelConfig) -> dict[str, tuple[str, int, tuple[int, ...]]]:
    """Hugging Face name -> (our parameter's name, its first row there, shape), for every tensor of a checkpoint."""
    with torch.device("meta"):
        parameters = dict(Decoder(config).named_parameters())
    found = {}
    for ours, theirs in tensor_names(config).items():
        row = 0
        for name, shape in zip(theirs, part_shapes(config, ours, parameters[ours].shape)):
            found[name] = (ours, row, shape)
            row += shape[0]
    return found


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
               sharded: bool = False) -> Decoder:
    """The decoder with the folder's weights, built on the meta device and filled tensor by tensor.

    sharded: cut over the ranks of a training; each reads its own rows alone.

    Raises BadInput that lists missing, unexpected and misshapen tensors by name.
    """
    config = load_config(folder)
    files = _weight_files(Path(folder))
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
    wanted = layout(config)
    found = {name: (path, shape) for path in files for name, shape in _tensor_shapes(path).items()}
    _check_tensors(folder, wanted, found, config)
    if sharded:
        ranks.shard(model, device)
        model.to_empty(device=device)
    else:  # to_empty would import sympy, which takes a second
        empty = {name: torch.empty(p.shape, dtype=dtype, device=device) for name, p in model.named_parameters()}
        model.load_state_dict(empty, assign=True)
    parameters = dict(model.named_parameters())
    for name, (ours, row, shape) in wanted.items():
        own, first = ranks.own_rows(parameters[ours])
        start, stop = max(row, first), min(row + shape[0], first + len(own))
        if start < stop:
            _read_tensor(found[name][0], name, start - row, own[start - first:stop - first])
    return model


def _weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files: those of the index, or the single one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        table = get_field(expect(read_json(index), dict, str(index)), "weight_map", dict, str(index))
        names = sorted({expect(name, str, f"{index}: field 'weight_map'") for name in table.values()})
    else:
        names = ["model.safetensors"]
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise BadInput(f"{folder / name}: no such file; the folder needs its safetensors weights (download them again)")
    return [folder / name for name in names]


def _tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with _reading_tensors(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


@contextmanager
def _reading_tensors(path: Path):
    """A safetensors file, whose every failure is a BadInput."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise BadInput(f"{path}: not a whole safetensors file ({str(error)[:200]}); download it again") from None


def _check_tensors(folder, wanted: dict, found: dict, config: ModelConfig) -> None:
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted and name not in ignored and not name.endswith("rotary_emb.inv_freq")]
    misshapen = [f"{name} {list(found[name][1])}, not {list(wanted[name][2])}" for name in wanted
                 if name in found and found[name][1] != wanted[name][2]]
    problems = [f"{len(names)} {what}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
                for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)) if names]
    if problems:
        raise BadInput(f"{folder}: the weights do not fit config.json ({'; '.join(problems)}); "
                       f"take config and weights from the same checkpoint")


def _read_tensor(path: Path, name: str, first: int, out: torch.Tensor) -> None:
    """Copy a tensor's rows from `first` on into `out`, a few at a time: each piece's file mapping is released before the next."""
    row_bytes = out[0].numel() * 4
    step = max(1, READ_BYTES // row_bytes)
    for start in range(0, len(out), step):
        with _reading_tensors(path) as file:
            piece = file.get_slice(name)[first + start:first + min(start + step, len(out))]
            if not piece.is_floating_point():
                raise BadInput(f"{path}: tensor '{name}' is {piece.dtype}, not floating point; use an unquantised checkpoint")
            out[start:start + step].copy_(piece)


def save_checkpoint(folder: str | Path, model: Decoder, tokenizer_from: str | Path, prompt: str | None = None,
                    dtype: torch.dtype = torch.float32, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a Hugging Face folder: weights, config, the tokenizer's files as they are, and the verification prompt.

    Written aside and renamed: an existing folder is replaced only by a whole one. Where the model is cut over the ranks, all
    of them must call this: its tensors are gathered one by one, and rank 0 writes them.
    """
    tensors = whole_tensors(model, dtype)
    if ranks.rank():
        for _ in tensors:
            pass
        return
    folder = Path(folder)
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        for name in TOKENIZER_FILES:
            if (Path(tokenizer_from) / name).is_file():
                shutil.copyfile(Path(tokenizer_from) / name, aside / name)
        if prompt is not None:
            (aside / PROMPT_FILE).write_text(prompt, encoding="utf-8")
        write_json(aside / "config.json", config_to_json(model.config, dtype, load_tokenizer(tokenizer_from).eos_ids))
        _save_weights(aside, tensors, model.config, dtype, shard_bytes)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    old = folder.with_name(folder.name + ".old")
    if folder.exists():  # two renames: at any moment one of the two is whole
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)  # also what a killed run left between the two


def save_file(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors' own, but a full disk is an OSError as everywhere else."""
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None


def whole_tensors(model: Decoder, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the model as Hugging Face names and cuts it, one after the other, on the CPU."""
    parameters, gathered = ranks.parameters(model), None
    for name, (ours, row, shape) in layout(model.config).items():
        if gathered != ours:
            gathered, tensor = ours, ranks.whole(parameters[ours].detach())
        yield name, tensor[row:row + shape[0]].to(dtype).contiguous().cpu()


def _save_weights(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], config: ModelConfig, dtype: torch.dtype,
                  shard_bytes: int) -> None:
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (_, _, shape) in layout(config).items()}  # in the order of `tensors`
    shards, room = [[]], shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    n = len(shards)
    files = ["model.safetensors"] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    for file, shard in zip(files, shards):
        save_file(dict(islice(tensors, len(shard))), folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, shard in zip(files, shards) for name in shard}})
