"""A checkpoint is a Hugging Face folder: config.json, *.safetensors, tokenizer.json and the chat template.

`load_model` and `load_tokenizer` read one; `save_checkpoint` writes one, which Transformers and vLLM open.
Nothing is executed from a checkpoint: no pickle, no code, and the chat template is bounded (template.py).
"""
from checkpoint.config import load_config
from checkpoint.prompt import PROMPT_FILE, read_prompt, read_template_args
from checkpoint.tokenizer import TOKENIZER_FILES, ChatTokenizer, load_tokenizer
from checkpoint.weights import DTYPES, load_model, save_checkpoint

__all__ = ["DTYPES", "PROMPT_FILE", "TOKENIZER_FILES", "ChatTokenizer", "load_config", "load_model",
           "load_tokenizer", "read_prompt", "read_template_args", "save_checkpoint"]
