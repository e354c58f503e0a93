"""config.json: what of it the decoder implements; everything else is refused by name."""
import json
import math
from pathlib import Path

import torch

from checkpoint.folder import find_folder
from checkpoint.rope import stretched_frequencies
from model import MLP, ModelConfig
from plumbing.errors import BadInput
from plumbing.files import expect, get_field, read_json

SIZE_LIMIT = 2 ** 24
MATRIX_LIMIT = 2 ** 36  # elements; the largest matrices of published models have 2 ** 31
LAYER_LIMIT = 1000
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


# -------------------------------------------------------------------------------- reading

def load_config(folder: str | Path, context: int | None = None) -> ModelConfig:
    """Read config.json in either dialect. Raises BadInput that names the field of what is not implemented.

    context: the longest sequence, instead of max_position_embeddings. Rotary embeddings need no table, and
             some models are served with twice what their config.json says.
    """
    path = find_folder(folder) / "config.json"
    raw = expect(read_json(path), dict, str(path))
    return parse_config(raw, str(path), context)


def parse_config(raw: dict, where: str, context: int | None = None) -> ModelConfig:
    """ModelConfig from the dict of a config.json; `where` names it in errors."""
    model_type = read_model_type(raw, where)
    hidden_size = read_size(raw, "hidden_size", where)
    heads = read_size(raw, "num_attention_heads", where)
    head_dim = read_size(raw, "head_dim", where, default=max(hidden_size // heads, 1))
    theta, scaling = read_rope(raw, where)
    config = ModelConfig(
        model_type=model_type,
        vocab_size=read_size(raw, "vocab_size", where),
        hidden_size=hidden_size,
        intermediate_size=read_size(raw, "intermediate_size", where),
        num_hidden_layers=read_size(raw, "num_hidden_layers", where, limit=LAYER_LIMIT),
        num_attention_heads=heads,
        num_key_value_heads=read_size(raw, "num_key_value_heads", where, default=heads),
        head_dim=head_dim,
        rms_norm_eps=read_number(raw, "rms_norm_eps", where, default=1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        stretched_frequencies=stretched_frequencies(scaling, theta, head_dim) if scaling else None,
        rope_attention_factor=scaling.get("attention_factor", 1.0) if scaling else 1.0,
        tie_word_embeddings=read_flag(raw, "tie_word_embeddings", where),
        max_position_embeddings=context or read_context(raw, scaling, where),
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        initializer_range=read_number(raw, "initializer_range", where, default=0.02),
    )
    refuse_sizes_that_do_not_fit(config, where)
    refuse_unimplemented(raw, config, where)
    return config


def read_model_type(raw: dict, where: str) -> str:
    model_type = get_field(raw, "model_type", str, where)
    if model_type not in ARCHITECTURES:
        raise BadInput(f"{where}: field 'model_type': {model_type!r} is not implemented; "
                       f"use one of {', '.join(ARCHITECTURES)}")
    return model_type


def read_flag(raw: dict, name: str, where: str, default: bool = False) -> bool:
    """raw[name], true or false; `default` where it is absent or null."""
    if raw.get(name) is None:
        return default
    return expect(raw[name], bool, f"{where}: field '{name}'")


def read_size(raw: dict, name: str, where: str, default: int | None = None, limit: int = SIZE_LIMIT) -> int:
    """raw[name], a whole number from 1 to `limit`; `default` where it is absent or null."""
    if default is not None and raw.get(name) is None:
        return default
    value = get_field(raw, name, int, where)
    if not 1 <= value <= limit:
        raise BadInput(f"{where}: field '{name}': {value} is out of range (1 to {limit}); correct it")
    return value


def read_number(raw: dict, name: str, where: str, default: float | None = None) -> float:
    """raw[name], a positive number; `default` where it is absent or null."""
    value = default if raw.get(name) is None else raw[name]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < 1e30:  # nor nan
        raise BadInput(f"{where}: field '{name}': expected a positive number, found {str(value)[:40]!r}; "
                       "correct it")
    return float(value)


def read_context(raw: dict, scaling: dict | None, where: str) -> int:
    """The longest sequence: max_position_embeddings, or what YaRN makes of the old context if that is more.

    Qwen2.5's long form differs from its short one in rope_scaling alone.
    """
    length = read_size(raw, "max_position_embeddings", where, default=32768)
    if scaling is not None and scaling["rope_type"] == "yarn":
        length = max(length, int(scaling["original_max_position_embeddings"] * scaling["factor"]))
    return length


# -------------------------------------------------------------------------------- rotary embeddings

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def read_rope(raw: dict, where: str) -> tuple[float, dict | None]:
    """(theta, scaling or None), from `rope_theta` + `rope_scaling` or Transformers 5's `rope_parameters`.

    Where both stand, Transformers takes the older, and so do we. Defaults are filled in.
    """
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    where_rope = f"{where}: field '{field}'"
    rope = expect(raw.get(field) or {}, dict, where_rope)
    if any(isinstance(value, dict) for value in rope.values()):
        raise BadInput(f"{where_rope}: one for each type of layer is not implemented; use another checkpoint")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise BadInput(f"{where_rope}: partial_rotary_factor is not implemented; use another checkpoint")
    theta = read_number(rope if "rope_theta" in rope else raw, "rope_theta", where, default=10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise BadInput(f"{where_rope}: rope type {str(kind)[:40]!r} is not implemented "
                       f"(only {', '.join(ROPE_TYPES)}); use another checkpoint")
    if kind == "default":
        return theta, None
    scaling = {"rope_type": kind, "factor": read_number(rope, "factor", where_rope)}
    if kind == "linear":
        return theta, scaling
    scaling["original_max_position_embeddings"] = read_old_context(raw, rope, where, where_rope)
    if kind == "llama3":
        scaling["low_freq_factor"] = read_number(rope, "low_freq_factor", where_rope)
        scaling["high_freq_factor"] = read_number(rope, "high_freq_factor", where_rope)
        if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            raise BadInput(f"{where_rope}: high_freq_factor must be above low_freq_factor; correct it")
        return theta, scaling
    if theta <= 1:
        raise BadInput(f"{where}: field 'rope_theta': {theta} must be above 1 for YaRN; correct it")
    scaling["beta_fast"] = read_number(rope, "beta_fast", where_rope, default=32.0)
    scaling["beta_slow"] = read_number(rope, "beta_slow", where_rope, default=1.0)
    if scaling["beta_fast"] < scaling["beta_slow"]:
        raise BadInput(f"{where_rope}: beta_fast must not be below beta_slow; correct it")
    scaling["truncate"] = read_flag(rope, "truncate", where_rope, default=True)
    scaling["attention_factor"] = read_attention_factor(rope, scaling["factor"], where_rope)
    return theta, scaling


def read_old_context(raw: dict, rope: dict, where: str, where_rope: str) -> int:
    """The context that a model had before it was stretched. As in Transformers, three fields may tell it."""
    name = "original_max_position_embeddings"
    own = read_size(raw, "max_position_embeddings", where, default=32768)
    in_rope = read_number(rope, name, where_rope, default=own)
    return int(read_number(raw, name, where, default=in_rope))  # a float in some files


def read_attention_factor(rope: dict, factor: float, where: str) -> float:
    """What YaRN multiplies queries and keys with: 0.1 ln(factor) + 1, unless the file says otherwise."""
    def by_length(weight: float) -> float:
        return 0.1 * weight * math.log(max(factor, 1)) + 1

    default = by_length(1)
    if rope.get("mscale") and rope.get("mscale_all_dim"):  # DeepSeek's
        default = by_length(read_number(rope, "mscale", where))
        default /= by_length(read_number(rope, "mscale_all_dim", where))
    return read_number(rope, "attention_factor", where, default=default)


# -------------------------------------------------------------------------------- refusing

def refuse_sizes_that_do_not_fit(config: ModelConfig, where: str) -> None:
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if head_dim % 2:
        raise BadInput(f"{where}: field 'head_dim': {head_dim} is odd, and rotary embeddings turn pairs; "
                       "correct it")
    if heads % kv_heads:
        raise BadInput(f"{where}: field 'num_key_value_heads': {heads} heads of size {head_dim} cannot be "
                       f"shared by {kv_heads}; correct it")
    # of the largest matrix
    rows = max((heads + 2 * kv_heads) * head_dim, 2 * config.intermediate_size, config.vocab_size)
    if rows * config.hidden_size > MATRIX_LIMIT:
        raise BadInput(f"{where}: a matrix of {rows} by {config.hidden_size} cannot be; correct the sizes")


def refuse_unimplemented(raw: dict, config: ModelConfig, where: str) -> None:
    """BadInput for a field that asks for another decoder than ours."""
    window = raw.get("sliding_window", 4096)  # Transformers' default where the field is absent
    has_window = raw.get("use_sliding_window", config.model_type == "mistral") and window is not None
    window_is_wide = isinstance(window, int) and window >= config.max_position_embeddings
    asks_for = {
        "architectures": asks_for_another_head(raw, where),
        "hidden_act": raw.get("hidden_act", "silu") != MLP.hidden_act,
        "attention_bias": bool(raw.get("attention_bias")) and config.model_type != "qwen2",
        "mlp_bias": bool(raw.get("mlp_bias")),
        "sliding_window": has_window and not window_is_wide,
        "layer_types": asks_for_other_layers(raw, has_window, where),
        "num_experts": bool(raw.get("num_experts")),
        "num_local_experts": bool(raw.get("num_local_experts")),
        "partial_rotary_factor": raw.get("partial_rotary_factor") not in (None, 1, 1.0),
        "quantization_config": bool(raw.get("quantization_config")),
    }
    for name, asked in asks_for.items():
        if asked:
            value = json.dumps(raw.get(name))[:60]
            raise BadInput(f"{where}: field '{name}': {value} is not implemented; "
                           "use a checkpoint without it")


def asks_for_another_head(raw: dict, where: str) -> bool:
    """Whether `architectures` names no language model, but a classifier or another reward model, say."""
    kinds = expect(raw.get("architectures") or [], list, f"{where}: field 'architectures'")
    return bool(kinds) and not any(str(kind).endswith("ForCausalLM") for kind in kinds)


def asks_for_other_layers(raw: dict, has_window: bool, where: str) -> bool:
    """Whether `layer_types` names a layer without full attention. Without a window, a sliding one has it."""
    full = ["full_attention"] if has_window else ["full_attention", "sliding_attention"]
    kinds = expect(raw.get("layer_types") or [], list, f"{where}: field 'layer_types'")
    return any(kind not in full for kind in kinds)


# -------------------------------------------------------------------------------- writing

SAVED_FIELDS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling",
    "tie_word_embeddings", "max_position_embeddings", "initializer_range")


def config_to_json(config: ModelConfig, dtype: torch.dtype, eos_ids: list[int]) -> dict:
    """The config.json of a saved checkpoint, in the dialect that Transformers 4 and 5 and vLLM read."""
    raw = {"architectures": [ARCHITECTURES[config.model_type]]}
    for name in SAVED_FIELDS:
        raw[name] = getattr(config, name)
    raw["hidden_act"] = MLP.hidden_act
    raw["eos_token_id"] = eos_ids
    raw["torch_dtype"] = str(dtype).removeprefix("torch.")
    if config.model_type == "mistral":
        raw["sliding_window"] = None  # where it is absent, Transformers takes 4096
    return raw
