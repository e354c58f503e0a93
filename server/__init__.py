"""A model behind a server: K analyses and P(Yes) from an OpenAI-compatible completions endpoint (vLLM, SGLang, llama.cpp).

    vllm serve MODEL --served-model-name judge
    python score.py --server http://localhost:8000 --model judge --tokenizer FOLDER --input gsm8k.json --out scores.jsonl

The chat template is rendered here, with the tokenizer of FOLDER (no weights needed), and prompts travel as token ids: no
text in them can become a special token, and no server adds a second begin-of-text token. P(Yes) comes from the top
log-probabilities at the verdict. What the server can do is tried out before the first case, not assumed.
"""
from server.http import parse_url, read_key
from server.sampler import load_served

__all__ = ["load_served", "parse_url", "read_key"]
