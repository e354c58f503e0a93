"""A real server of the completions protocol on CPU: llama.cpp, with a checkpoint folder's weights in fp32.

    pip install xllamacpp gguf
    python tests/server/llama_server.py FOLDER PORT     # serves until it is stopped, under the name "model"

It is there to compare with the same weights here: for Llama and Qwen2 folders with plain RoPE. Prompts must
come as token ids, since the tokenizer's rules for cutting text are not carried over.
"""
import json
import sys
import tempfile
import threading
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file

NAMES = {  # of tensors: in the checkpoint -> in llama.cpp
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(folder: Path, path: Path) -> None:
    """The checkpoint as a GGUF file in fp32: the numbers that the local path computes with."""
    config = json.loads((folder / "config.json").read_text())
    kind = config["model_type"]
    heads = config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    write_vocabulary(writer, folder, config["vocab_size"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem, kind_of = name.rsplit(".", 1)
        if stem.startswith("model.layers."):
            _, _, layer, name_in_layer = stem.split(".", 3)
            stem = f"blk.{layer}.{NAMES[name_in_layer]}"
        else:
            stem = NAMES[stem]
        if kind == "llama" and stem.endswith(("attn_q", "attn_k")):
            # RoPE turns two neighbouring dimensions there, here one of each half
            n = heads if stem.endswith("attn_q") else kv_heads
            tensor = tensor.unflatten(0, (n, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(f"{stem}.{kind_of}", tensor.to(torch.float32).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_vocabulary(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    words = {i: word for word, i in raw["model"]["vocab"].items()}
    words |= {token["id"]: token["content"] for token in raw["added_tokens"]}
    special = {token["id"] for token in raw["added_tokens"]}
    eos = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([words.get(i, f"[PAD{i}]") for i in range(size)])
    types = [gguf.TokenType.UNUSED] * size
    for i in words.keys() & set(range(size)):
        types[i] = gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL
    writer.add_token_types(types)
    merges = raw["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_eos_token_id(eos[0] if isinstance(eos, list) else eos)
    writer.add_add_bos_token(False)


def start(folder: Path, port: int = 0, slots: int = 4, context: int = 8192, threads: int = 1, exact: bool = True):
    """An xllamacpp.Server of the checkpoint, in this process: `listening_address` is its URL (port 0: a free one).

    slots    sequences side by side, of `context` tokens each
    exact    keep keys and values in fp32; by default they are rounded to 16 bits, and with flash attention
             sums too
    """
    import xllamacpp
    params = xllamacpp.CommonParams()
    params.model_alias = {"model"}
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = slots
    params.n_ctx = slots * context
    if exact:
        params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    with tempfile.TemporaryDirectory() as aside:  # the weights stay mapped when the file is gone
        path = Path(aside) / "model.gguf"
        write_gguf(folder, path)
        params.model.path = str(path)
        return xllamacpp.Server(params)


if __name__ == "__main__":
    server = start(Path(sys.argv[1]), int(sys.argv[2]))
    print("serving", server.listening_address, flush=True)
    threading.Event().wait()
