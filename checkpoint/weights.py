"""The weights: safetensors, streamed in tensor by tensor, and saved as Transformers and vLLM read them.

The decoder stacks some tensors of a checkpoint in one parameter, one above the other (`STACKED`). So a tensor
of a checkpoint is a run of rows of a parameter (`Rows`), and loading and saving copy rows.
"""
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoint.config import config_to_json, load_config
from checkpoint.prompt import PROMPT_FILE
from checkpoint.tokenizer import TOKENIZER_FILES, ChatTokenizer, load_tokenizer
from lora import LoRA, LoRALinear, add_adapters, change
from model import Decoder, ModelConfig
from plumbing import ranks
from plumbing.errors import BadInput
from plumbing.files import expect, get_field, read_json, write_json

SHARD_BYTES = 5_000_000_000
READ_BYTES = 16_000_000  # of a file are mapped at a time, so that loading peaks little above the weights
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# -------------------------------------------------------------------------------- what stands where

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# our parameter -> the Hugging Face tensors that are stacked in it
STACKED = {
    "embed.weight": (EMBEDDING,),
    "norm.weight": ("model.norm.weight",),
    "head.weight": (HEAD,),
}
# the same within a layer
STACKED_IN_LAYER = {
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


class Rows(NamedTuple):
    """Where a Hugging Face tensor lies: `shape[0]` rows of our parameter, from row `first` on."""
    parameter: str
    first: int
    shape: tuple[int, ...]


def layout(config: ModelConfig) -> dict[str, Rows]:
    """Hugging Face name -> its rows, for every tensor of a checkpoint with this config.

    Example: model.layers.0.self_attn.k_proj.weight -> (layers.0.attention.qkv.weight, 64, (32, 64)).
    """
    with torch.device("meta"):
        parameters = dict(Decoder(config).named_parameters())
    found = {}
    for parameter, tensor in parameters.items():
        first = 0
        names = stacked_in(parameter)
        for name, rows in zip(names, stacked_rows(config, parameter, len(tensor)), strict=True):
            found[name] = Rows(parameter, first, (rows, *tensor.shape[1:]))
            first += rows
    return found


def stacked_in(parameter: str) -> list[str]:
    """The tensors in a parameter: layers.3.mlp.down.weight -> [model.layers.3.mlp.down_proj.weight]."""
    in_layer = re.fullmatch(r"layers\.(\d+)\.(.+)", parameter)
    if in_layer is None:
        return list(STACKED[parameter])
    layer, name = in_layer.groups()
    return [f"model.layers.{layer}.{theirs}" for theirs in STACKED_IN_LAYER[name]]


def stacked_rows(config: ModelConfig, parameter: str, rows: int) -> list[int]:
    """How many of a parameter's rows each of the tensors stacked in it has."""
    if ".qkv." in parameter:
        q = config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        return [q, kv, kv]
    if ".gate_up." in parameter:
        return [config.intermediate_size, config.intermediate_size]
    return [rows]


# -------------------------------------------------------------------------------- loading

STORED_DTYPES = ("F64", "F32", "F16", "BF16")  # in one file or another: each tensor is converted by itself


class Stored(NamedTuple):
    """A tensor in a file."""
    path: Path
    shape: tuple[int, ...]


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
               sharded: bool = False, context: int | None = None, lora: LoRA | None = None) -> Decoder:
    """The decoder with the folder's weights, built on the meta device and filled tensor by tensor.

    sharded: cut over the ranks of a training; each reads its own rows alone.
    context: the longest sequence, instead of config.json's max_position_embeddings.
    lora: with adapters, which have no values yet, and all of the folder's weights frozen.

    Raises BadInput that lists missing, unexpected and misshapen tensors by name.
    """
    config = load_config(folder, context)
    wanted = layout(config)
    stored = stored_tensors(weight_files(Path(folder)))
    check_tensors(folder, wanted, stored, config)
    if config.tie_word_embeddings and HEAD in stored:
        check_tied_head(folder, stored)
    model = empty_model(config, dtype, device, sharded, lora)
    parameters = dict(model.named_parameters())
    for name, rows in wanted.items():
        read_rows(stored[name].path, name, rows, parameters[rows.parameter])
    return model


def empty_model(config: ModelConfig, dtype: torch.dtype, device: torch.device | str,
                sharded: bool, lora: LoRA | None) -> Decoder:
    """A decoder whose parameters have memory, but no values yet."""
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
    if lora:
        add_adapters(model, lora)
    if sharded:
        ranks.shard(model, device)
        return model.to_empty(device=device)
    empty = {}  # without to_empty, which would import sympy: that takes a second
    for name, parameter in model.named_parameters():
        empty[name] = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    model.load_state_dict(empty, assign=True)
    return model


def stored_tensors(files: list[Path]) -> dict[str, Stored]:
    """All tensors of some files, by name."""
    found = {}
    for path in files:
        with reading_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118, as the file is no dict
                tensor = file.get_slice(name)
                if tensor.get_dtype() not in STORED_DTYPES:
                    raise BadInput(f"{path}: tensor '{name}' is {tensor.get_dtype()}, not one of "
                                   f"{', '.join(STORED_DTYPES)}; use an unquantised checkpoint")
                if name in found:
                    raise BadInput(f"{path}: tensor '{name}' stands in {found[name].path.name} too; "
                                   "download the checkpoint again")
                found[name] = Stored(path, tuple(tensor.get_shape()))
    return found


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files: the single one, or those of the index.

    Where both are there, the index was left behind by an older version: Transformers takes the single file.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file() and not (folder / "model.safetensors").is_file():
        table = get_field(expect(read_json(index), dict, str(index)), "weight_map", dict, str(index))
        names = sorted({expect(name, str, f"{index}: field 'weight_map'") for name in table.values()})
    for name in names:
        is_within = Path(name).name == name
        if not is_within or not (folder / name).is_file():
            raise BadInput(f"{folder / name}: no such file; the folder needs its safetensors weights "
                           "(download them again)")
    return [folder / name for name in names]


@contextmanager
def reading_tensors(path: Path):
    """A safetensors file, whose every failure is a BadInput."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise BadInput(f"{path}: not a whole safetensors file ({str(error)[:200]}); "
                       "download it again") from None


def check_tensors(folder: str | Path, wanted: dict[str, Rows], stored: dict[str, Stored],
                  config: ModelConfig) -> None:
    """BadInput where the files' tensors are not those of the config."""
    needed = {name: tensor for name, tensor in stored.items() if not has_no_use(name, config)}
    problems = list_problems(wanted, needed)
    if problems:
        raise BadInput(f"{folder}: the weights do not fit config.json ({problems}); "
                       "take config and weights from the same checkpoint")


def list_problems(wanted: dict[str, Rows], stored: dict[str, Stored]) -> str:
    """The tensors that are missing, unexpected or misshapen, by name; "" if there are none."""
    missing = [name for name in wanted if name not in stored]
    unexpected = [name for name in stored if name not in wanted]
    misshapen = []
    for name, rows in wanted.items():
        if name in stored and stored[name].shape != rows.shape:
            misshapen.append(f"{name} {list(stored[name].shape)}, not {list(rows.shape)}")
    problems = []
    for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)):
        if names:
            more = ", ..." if len(names) > 8 else ""
            problems.append(f"{len(names)} {what}: {', '.join(names[:8])}{more}")
    return "; ".join(problems)


def has_no_use(name: str, config: ModelConfig) -> bool:
    """Whether a tensor is one that the decoder does not need: a tied head, a table of angles."""
    return (name == HEAD and config.tie_word_embeddings) or name.endswith("rotary_emb.inv_freq")


def check_tied_head(folder: str | Path, stored: dict[str, Stored]) -> None:
    """BadInput where config.json ties the head to the embedding, and the file has another head.

    One of the two is wrong, and nothing tells which: some libraries tie them all the same, others do not.
    """
    if stored[HEAD].shape != stored[EMBEDDING].shape or not same_tensors(stored, HEAD, EMBEDDING):
        raise BadInput(f"{folder}: config.json: field 'tie_word_embeddings' is true, but {HEAD} is another "
                       f"tensor than {EMBEDDING}; set the field to false if the head was trained, else leave "
                       "that tensor out")


def same_tensors(stored: dict[str, Stored], name: str, other: str) -> bool:
    """Whether two tensors of the files are equal. A few rows at a time are read, and held."""
    rows, *rest = stored[name].shape
    step = max(1, READ_BYTES // (math.prod(rest) * 4))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if not torch.equal(read_slice(stored, name, start, stop), read_slice(stored, other, start, stop)):
            return False
    return True


def read_slice(stored: dict[str, Stored], name: str, start: int, stop: int) -> Tensor:
    with reading_tensors(stored[name].path) as file:
        return file.get_slice(name)[start:stop].float()  # as the two may be of different types


def read_rows(path: Path, name: str, rows: Rows, parameter: Tensor) -> None:
    """Copy a tensor of a file into its rows of a parameter, as far as they lie on this rank."""
    own, own_first = ranks.own_rows(parameter)
    start = max(rows.first, own_first)
    stop = min(rows.first + rows.shape[0], own_first + len(own))
    if start < stop:
        out = own[start - own_first:stop - own_first]
        read_tensor(path, name, start - rows.first, out)


def read_tensor(path: Path, name: str, first: int, out: Tensor) -> None:
    """Copy a tensor's rows from `first` on into `out`, a few at a time.

    The file is opened for each piece, so that what was mapped for the one before is released.
    """
    step = max(1, READ_BYTES // (out[0].numel() * 4))
    for start in range(0, len(out), step):
        stop = min(start + step, len(out))
        with reading_tensors(path) as file:
            out[start:stop].copy_(file.get_slice(name)[first + start:first + stop])


# -------------------------------------------------------------------------------- saving

def save_checkpoint(folder: str | Path, model: Decoder, tokenizer_from: str | Path, prompt: str | None = None,
                    dtype: torch.dtype = torch.float32, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a Hugging Face folder: weights, config, the tokenizer's files and the verification prompt.

    Adapters are merged into the weights. Where the model is cut over the ranks, all of them must call this:
    its tensors are gathered one by one, and rank 0 writes them.
    """
    tensors = whole_tensors(model, dtype)
    if ranks.rank():
        for _ in tensors:
            pass
        return
    with replacing(Path(folder)) as aside:
        tokenizer = save_words(aside, tokenizer_from, prompt)
        write_json(aside / "config.json", config_to_json(model.config, dtype, tokenizer.eos_ids))
        save_weights(aside, tensors, model.config, dtype, shard_bytes)


def save_words(folder: Path, tokenizer_from: str | Path, prompt: str | None) -> ChatTokenizer:
    """Write the tokenizer's files and the verification prompt. -> the tokenizer"""
    for name in TOKENIZER_FILES:
        if (Path(tokenizer_from) / name).is_file():
            shutil.copyfile(Path(tokenizer_from) / name, folder / name)
    if prompt is not None:
        (folder / PROMPT_FILE).write_text(prompt, encoding="utf-8")
    tokenizer = load_tokenizer(tokenizer_from)
    name_all_ends(folder, tokenizer)
    return tokenizer


def name_all_ends(folder: Path, tokenizer: ChatTokenizer) -> None:
    """Have a saved checkpoint's copies of the tokenizer's files tell every end of an answer.

    Transformers and vLLM stop at what generation_config.json names, whatever config.json says.
    """
    path = folder / "generation_config.json"
    if path.is_file():
        write_json(path, read_json(path) | {"eos_token_id": tokenizer.eos_ids})
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    if not config.get("eos_token"):
        write_json(path, config | {"eos_token": tokenizer.added[tokenizer.eos_ids[0]].content})


@contextmanager
def replacing(folder: Path):
    """A folder that is written aside and renamed when whole; after an error the old one is as it was.

    It takes two renames: at any moment one of the two folders is whole. What a killed run left is removed.
    """
    aside = folder.with_name(folder.name + ".tmp")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def whole_tensors(model: Decoder, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the model as Hugging Face names and cuts it, one after the other, on the CPU."""
    parameters = ranks.parameters(model)
    gathered = None  # the parameter whose rows are all here
    for name, rows in layout(model.config).items():
        if gathered != rows.parameter:
            gathered = rows.parameter
            whole = merged(model, parameters, gathered)
        tensor = whole[rows.first:rows.first + rows.shape[0]]
        yield name, tensor.to(dtype).contiguous().cpu()


def merged(model: Decoder, parameters: dict[str, Tensor], name: str) -> Tensor:
    """A parameter with all its rows, and with what its adapters add to it."""
    whole = ranks.whole(parameters[name].detach())
    path, _, kind = name.rpartition(".")
    module = model.get_submodule(path)
    if kind == "weight" and isinstance(module, LoRALinear):
        a = ranks.whole(parameters[f"{path}.lora_A"].detach())
        b = ranks.whole(parameters[f"{path}.lora_B"].detach())
        whole = whole + change(a, b, module.parts, module.lora)
    return whole


def save_weights(folder: Path, tensors: Iterator[tuple[str, Tensor]], config: ModelConfig,
                 dtype: torch.dtype, shard_bytes: int) -> None:
    """Write the tensors, which come in the order of `layout`, into one file or into several and an index."""
    sizes = {name: math.prod(rows.shape) * dtype.itemsize for name, rows in layout(config).items()}
    shards = divide(sizes, shard_bytes)
    files = shard_names(len(shards))
    for file, shard in zip(files, shards, strict=True):
        save_file(dict(islice(tensors, len(shard))), folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {}
        for file, shard in zip(files, shards, strict=True):
            weight_map |= dict.fromkeys(shard, file)
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def divide(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """The names, in their order, in lists whose sizes add up to the limit at most. A larger one is alone."""
    shards = [[]]
    used = 0
    for name, size in sizes.items():
        if used + size > limit and shards[-1]:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors' own, but a full disk is an OSError as everywhere else."""
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        number = int(code[1])
        raise OSError(number, os.strerror(number), str(path)) from None
