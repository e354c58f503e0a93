"""A model behind a server: K analyses and P(Yes) from an OpenAI-compatible completions endpoint.

    vllm serve MODEL --served-model-name judge
    python score.py --server http://localhost:8000 --model judge --tokenizer FOLDER \\
        --input gsm8k.json --out scores.jsonl

The chat template is rendered here, with the tokenizer of FOLDER (no weights needed), and prompts travel as
token ids: no text in them can become a special token, and no server adds a second begin-of-text token. P(Yes)
comes from the top log-probabilities at the verdict. What the server (vLLM, SGLang, llama.cpp) can do is tried
out before the first case, not assumed.

    sampler.py      K analyses of a case: what rprm.Sampler is for a model here
    completions.py  token ids in, K continuations out, and P(Yes): what the engine is for a model here
    http.py         one request, asked again as long as its failure may pass
    jobs.py         many requests side by side
"""
from server.completions import takes_seeds
from server.http import Server
from server.jobs import side_by_side
from server.sampler import load_served

__all__ = ["Server", "load_served", "side_by_side", "takes_seeds"]
