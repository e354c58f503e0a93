"""A checkpoint is a Hugging Face folder: config.json, *.safetensors, tokenizer.json and the chat template.

`load_model` and `load_tokenizer` read one, `save_checkpoint` writes one that Transformers and vLLM open as it is.
Nothing is executed from a checkpoint: no pickle, no code, and the chat template runs in jinja2's sandbox, within a budget (template.py).
"""
import json
import math
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Iterator

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken, Tokenizer

import ranks
from cli import BadInput, get_field, expect, read_json, write_json
from model import Decoder, ModelConfig, keep_freed_memory
from template import render

SHARD_BYTES = 5_000_000_000
READ_BYTES = 16_000_000  # a file is mapped piece by piece, so that loading peaks little above the weights themselves
MATRIX_LIMIT = 2 ** 36  # elements; the largest matrices of published models have 2 ** 31
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json")
PROMPT_FILE = "verification_prompt.txt"  # the words a checkpoint was trained with travel with it

# our parameter -> the Hugging Face tensors that stand in it, one above the other
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
                 "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
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


# ---------------------------------------------------------------------------------------------- config.json

def load_config(folder: str | Path) -> ModelConfig:
    """Read config.json in either dialect. Raises BadInput that names the field for anything not implemented."""
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise BadInput(f"{folder}: no such checkpoint folder; "
                       f"give --model a Hugging Face folder (config.json, *.safetensors, tokenizer.json)")
    return parse_config(expect(read_json(path), dict, str(path)), str(path))


def parse_config(raw: dict, where: str) -> ModelConfig:
    """ModelConfig from the dict of a config.json; `where` names it in errors."""
    model_type = get_field(raw, "model_type", str, where)
    if model_type not in ARCHITECTURES:
        raise BadInput(f"{where}: field 'model_type': {model_type!r} is not implemented; use one of {', '.join(ARCHITECTURES)}")

    def size(name: str, default: int | None = None, limit: int = 2 ** 24) -> int:
        value = raw.get(name)
        value = default if value is None and default else get_field(raw, name, int, where)
        if not 1 <= value <= limit:
            raise BadInput(f"{where}: field '{name}': {value} is out of range (1 to {limit}); correct it")
        return value

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    kv_heads = size("num_key_value_heads", heads)
    head_dim = size("head_dim", max(hidden // heads, 1))
    if head_dim % 2:
        raise BadInput(f"{where}: field 'head_dim': {head_dim} is odd, and rotary embeddings turn pairs; correct it")
    if heads % kv_heads:
        raise BadInput(f"{where}: field 'num_key_value_heads': {heads} heads of size {head_dim} cannot be shared by {kv_heads}; correct it")
    widest = max((heads + 2 * kv_heads) * head_dim, 2 * size("intermediate_size"), size("vocab_size"))
    if widest * hidden > MATRIX_LIMIT:
        raise BadInput(f"{where}: a matrix of {widest} by {hidden} cannot be; correct the sizes")
    theta, scaling = _rope(raw, where)
    config = ModelConfig(
        model_type=model_type, vocab_size=size("vocab_size"), hidden_size=hidden,
        intermediate_size=size("intermediate_size"), num_hidden_layers=size("num_hidden_layers", limit=1000),
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6, where), rope_theta=theta, rope_scaling=scaling,
        tie_word_embeddings=expect(raw.get("tie_word_embeddings", False), bool, f"{where}: field 'tie_word_embeddings'"),
        max_position_embeddings=size("max_position_embeddings", 32768),
        qkv_bias=model_type == "qwen2", qk_norm=model_type == "qwen3",
        initializer_range=_number(raw, "initializer_range", 0.02, where))
    _refuse_unimplemented(raw, config, where)
    return config


def _number(raw: dict, name: str, default: float, where: str) -> float:
    value = raw.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise BadInput(f"{where}: field '{name}': expected a positive number, found {str(value)[:40]!r}; correct it")
    return float(value)


def _rope(raw: dict, where: str) -> tuple[float, dict | None]:
    """(theta, Llama-3 scaling or None) from `rope_theta` + `rope_scaling`, or from Transformers 5's `rope_parameters`."""
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"  # where both stand, Transformers takes the older
    rope = expect(raw.get(field) or {}, dict, f"{where}: field '{field}'")
    theta = _number(rope if "rope_theta" in rope else raw, "rope_theta", 10000.0, where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise BadInput(f"{where}: field '{field}': rope type {str(kind)[:40]!r} is not implemented (only default and llama3); "
                       f"use another checkpoint")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = {"rope_type": "llama3"} | {name: _number(rope, name, -1, f"{where}: field '{field}'") for name in names}
    scaling["original_max_position_embeddings"] = int(scaling["original_max_position_embeddings"])  # Transformers warns of a float
    if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise BadInput(f"{where}: field '{field}': high_freq_factor must be above low_freq_factor; correct it")
    return theta, scaling


def _refuse_unimplemented(raw: dict, config: ModelConfig, where: str) -> None:
    window = raw.get("sliding_window", 4096)  # Transformers' default where the field is absent
    windowed = raw.get("use_sliding_window", config.model_type == "mistral") and window is not None
    kinds = expect(raw.get("layer_types") or [], list, f"{where}: field 'layer_types'")
    asked = {
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(raw.get("attention_bias")) and config.model_type != "qwen2",
        "mlp_bias": bool(raw.get("mlp_bias")),
        "sliding_window": windowed and not (isinstance(window, int) and window >= config.max_position_embeddings),
        "layer_types": any(kind != "full_attention" and (windowed or kind != "sliding_attention") for kind in kinds),
        "num_experts": bool(raw.get("num_experts")),
        "num_local_experts": bool(raw.get("num_local_experts")),
        "partial_rotary_factor": raw.get("partial_rotary_factor") not in (None, 1, 1.0),
        "quantization_config": bool(raw.get("quantization_config")),
    }
    for name, refused in asked.items():
        if refused:
            raise BadInput(f"{where}: field '{name}': {json.dumps(raw.get(name))[:60]} is not implemented; use a checkpoint without it")


def config_to_json(config: ModelConfig, dtype: torch.dtype, eos_ids: list[int]) -> dict:
    """The config.json of a saved checkpoint, in the dialect that Transformers 4 and 5 and vLLM read."""
    names = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings",
             "max_position_embeddings", "initializer_range")
    return ({"architectures": [ARCHITECTURES[config.model_type]]} | {name: getattr(config, name) for name in names}
            | {"hidden_act": "silu", "eos_token_id": eos_ids, "torch_dtype": str(dtype).removeprefix("torch.")}
            | ({"sliding_window": None} if config.model_type == "mistral" else {}))


# ---------------------------------------------------------------------------------------------- weights

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
    keep_freed_memory()
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


# ---------------------------------------------------------------------------------------------- tokenizer

@dataclass
class ChatTokenizer:
    """tokenizer.json with the checkpoint's chat template around one user message.

    A text from a user or a model is tokenised as text: a special token spelled out in it ("<|im_end|>") becomes the
    characters, never the token, so it can neither end a turn nor open one.
    """
    backend: Tokenizer
    before: list[int]  # the template's tokens before the user's message, up to the last special one
    lead: str          # its plain text from there to the message, tokenised with it: "[INST] " and a word join
    trail: str         # its plain text after the message, up to the next special token
    after: list[int]   # and the rest, up to where the answer begins
    eos_ids: list[int]  # every id that ends an answer; the first one ends the answers we train on
    vocab_size: int    # config.json's: the model has no embedding for an id from here on

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        with _calling_the_library("tokenizer.json"):
            ids = self.backend.encode(text, add_special_tokens=False).ids
        if ids and max(ids) >= self.vocab_size:
            raise BadInput(f"tokenizer.json: token {max(ids)} in {text[:40]!r} has no row in the model's vocabulary of {self.vocab_size}; "
                           f"take tokenizer and config from the same checkpoint")
        return ids

    def encode_marked(self, text: str) -> list[int]:
        """Token ids of a trusted text in which special tokens are meant as such (templates, pretraining text)."""
        self.backend.encode_special_tokens = False
        ids = self.encode(text)
        self.backend.encode_special_tokens = True
        return ids

    def chat(self, message: str) -> list[int]:
        """Token ids of the template with the user's message, ready for the answer."""
        return self.before + self.encode(self.lead + message + self.trail) + self.after

    def response(self, text: str) -> list[int]:
        """Token ids of an answer, with the end of the turn."""
        return self.encode(text) + self.eos_ids[:1]

    def decode(self, ids: list[int]) -> str:
        with _calling_the_library("tokenizer.json"):
            return self.backend.decode(ids, skip_special_tokens=False)


@contextmanager
def _calling_the_library(path: Path | str):
    """A tokenizer.json that the tokenizers library cannot use is a BadInput, whether the library raises or panics: its
    panics are BaseExceptions."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise BadInput(f"{path}: not a tokenizer that works ({str(error)[:80]}); download it again") from None


def load_tokenizer(folder: str | Path) -> ChatTokenizer:
    """Read tokenizer.json, tokenizer_config.json, generation_config.json and the chat template of a checkpoint folder."""
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BadInput(f"{path}: no such file; the checkpoint needs its tokenizer.json")
    with _calling_the_library(path):
        backend = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
    config = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= expect(read_json(folder / name), dict, str(folder / name))
    tokens = {name: _token_text(config.get(name), f"{folder / 'tokenizer_config.json'}: field '{name}'")
              for name in ("bos_token", "eos_token")}
    eos_ids = _eos_ids(folder, backend, tokens["eos_token"])
    before, after = _render_template(folder, config, tokens)
    special = [token.content for token in added.values()]
    with _calling_the_library(path):  # some files do not mark these as special, and then they would count as such in a user's text
        marks = [t for i, t in added.items() if i in eos_ids or (t.content.strip() and t.content in before + after)]
        backend.add_special_tokens([AddedToken(t.content, single_word=t.single_word, lstrip=t.lstrip, rstrip=t.rstrip,
                                               normalized=t.normalized) for t in marks])
    last = max((before.rfind(token) + len(token) for token in special if token in before), default=0)
    first = min((after.find(token) for token in special if token in after), default=len(after))
    tokenizer = ChatTokenizer(backend, [], before[last:], after[:first], [], eos_ids, _vocab_size(folder, eos_ids))
    tokenizer.before, tokenizer.after = tokenizer.encode_marked(before[:last]), tokenizer.encode_marked(after[first:])
    return tokenizer


def _token_text(token: str | dict | None, where: str) -> str:
    return expect((token.get("content") if isinstance(token, dict) else token) or "", str, where)


def _eos_ids(folder: Path, backend: Tokenizer, eos_token: str) -> list[int]:
    """The end-of-text ids: the tokenizer's own first, then generation_config.json's and config.json's (int or list)."""
    ids = [backend.token_to_id(eos_token)] if eos_token else []
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value = expect(read_json(folder / name), dict, str(folder / name)).get("eos_token_id")
            ids += value if isinstance(value, list) else [value]
    ids = list(dict.fromkeys(i for i in ids if isinstance(i, int) and not isinstance(i, bool)))
    if not ids:
        raise BadInput(f"{folder / 'tokenizer_config.json'}: field 'eos_token' is missing, and no file has 'eos_token_id'; add one")
    return ids


def _vocab_size(folder: Path, eos_ids: list[int]) -> int:
    """The vocabulary of config.json's model (without one: any), which must hold the end-of-text ids."""
    path = folder / "config.json"
    size = expect(read_json(path), dict, str(path)).get("vocab_size") if path.is_file() else None
    size = 2 ** 63 if size is None else expect(size, int, f"{path}: field 'vocab_size'")
    if not all(0 <= i < size for i in eos_ids):
        raise BadInput(f"{path}: field 'eos_token_id': {str(eos_ids)[:60]} are not all in the vocabulary of {size}; correct it")
    return size


def _render_template(folder: Path, config: dict, tokens: dict[str, str]) -> tuple[str, str]:
    """What the checkpoint's chat template puts before and after the user's message. Without a template: nothing, and a newline."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            source = path.read_text(encoding="utf-8")
        except ValueError:
            raise BadInput(f"{path}: not a text in UTF-8; download it again") from None
    else:
        path, source = folder / "tokenizer_config.json", config.get("chat_template")
    if isinstance(source, list):  # several named templates
        source = next((t.get("template") for t in source if isinstance(t, dict) and t.get("name") == "default"), None)
    if source is None:
        return tokens["bos_token"], "\n"
    expect(source, str, f"{path}: field 'chat_template'")
    mark = "\ue000the message\ue001"
    try:
        text = render(source, messages=[{"role": "user", "content": mark}], add_generation_prompt=True, **tokens)
    except Exception as error:  # a template is a program: whatever it raises is its own fault
        raise BadInput(f"{path}: the chat template fails on one user message ({str(error)[:80]}); correct it") from None
    if text.count(mark) != 1:
        raise BadInput(f"{path}: the chat template shows the user's message {text.count(mark)} times, not once; correct it")
    before, after = text.split(mark)
    return before, after
