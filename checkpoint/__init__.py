"""A checkpoint is a Hugging Face folder: config.json, *.safetensors, tokenizer.json and the chat template.

`load_model` and `load_tokenizer` read one, `save_checkpoint` writes one that Transformers and vLLM open as it is.
Nothing is executed from a checkpoint: no pickle, no code, and the chat template runs in jinja2's sandbox, within bounds (template.py).
"""
from checkpoint.config import load_config
from checkpoint.tokenizer import ChatTokenizer, load_tokenizer
from checkpoint.weights import DTYPES, PROMPT_FILE, TOKENIZER_FILES, load_model, save_checkpoint

__all__ = ["DTYPES", "PROMPT_FILE", "TOKENIZER_FILES", "ChatTokenizer", "load_config", "load_model", "load_tokenizer", "save_checkpoint"]
