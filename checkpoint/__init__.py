"""A checkpoint is a Hugging Face folder: config.json, *.safetensors, tokenizer.json and the chat template.

`load_model` and `load_tokenizer` read one; `save_checkpoint` writes one, which Transformers and vLLM open.
Adapters for one have a folder of their own, which PEFT opens (adapter.py).
Nothing is executed from a checkpoint: no pickle, no code, and the chat template is bounded (template.py).
"""
from checkpoint.adapter import load_for_sampling, load_for_training, merge_adapter, results
from checkpoint.config import load_config
from checkpoint.prompt import PROMPT_FILE, read_prompt, read_template_args, travelled_prompt
from checkpoint.scratch import new_model
from checkpoint.tokenizer import TOKENIZER_FILES, ChatTokenizer, load_tokenizer
from checkpoint.weights import DTYPES, load_model, save_checkpoint

__all__ = ["DTYPES", "PROMPT_FILE", "TOKENIZER_FILES", "ChatTokenizer", "load_config", "load_for_sampling",
           "load_for_training", "load_model", "load_tokenizer", "merge_adapter", "new_model", "read_prompt",
           "read_template_args", "results", "save_checkpoint", "travelled_prompt"]
