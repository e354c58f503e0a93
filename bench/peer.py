"""The peer of the sampling benchmarks: Transformers' `generate`, as well as a careful user can call it."""
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


def load(folder: str, dtype: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()


@torch.inference_mode()
def generate(model: PreTrainedModel, prompts: list[list[int]], k: int, new_tokens: int, eos_ids: list[int],
             temperature: float, top_p: float) -> list[list[int]]:
    """k continuations of each prompt of one batch, the end-of-text token included; [] for eos_ids turns ends off."""
    longest = max(map(len, prompts))
    pad = eos_ids[0] if eos_ids else 0
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)  # padded on the left
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    model.generation_config.eos_token_id = eos_ids or None
    out = model.generate(ids, attention_mask=mask, do_sample=True, temperature=temperature, top_p=top_p, top_k=0,
                         num_return_sequences=k, max_new_tokens=new_tokens, pad_token_id=pad, use_cache=True)
    return [cut_after_end(row, eos_ids) for row in out[:, longest:].tolist()]


def cut_after_end(row: list[int], eos_ids: list[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(row) if token in eos_ids), len(row))
    return row[:end]


@torch.inference_mode()
def p_yes(model: PreTrainedModel, sequence: list[int], yes_no: tuple[int, int]) -> float:
    """P(Yes) against P(No) after a sequence, by a full pass at batch size 1; only its last position passes the LM head."""
    logits = model(torch.tensor([sequence]), use_cache=False, logits_to_keep=1).logits[0, -1].float()
    return torch.sigmoid(logits[yes_no[0]] - logits[yes_no[1]]).item()
