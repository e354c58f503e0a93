"""config.json: what of it the decoder implements; everything else is refused by name."""
import json
from pathlib import Path

import torch

from model import ModelConfig
from plumbing.errors import BadInput
from plumbing.files import expect, get_field, read_json

MATRIX_LIMIT = 2 ** 36  # elements; the largest matrices of published models have 2 ** 31
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
                 "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


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
