"""The context's length: by config.json, by the user's word, and stretched by YaRN and linear scaling."""
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from checkpoint import load_config, load_model, save_checkpoint
from checkpoint.config import parse_config
from conftest import make_config, write_checkpoint
from model import Tree, rope_frequencies, rope_tables, tree_attention
from plumbing.errors import BadInput

LONG_FORMS = {
    "Qwen2.5's": dict(type="yarn", factor=4.0, original_max_position_embeddings=32),
    "all told": dict(rope_type="yarn", factor=8, original_max_position_embeddings=64.0, beta_fast=16,
                     beta_slow=2.0, truncate=False, attention_factor=1.5),
    "DeepSeek's": dict(rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0,
                       mscale_all_dim=0.5),
    "the config's own context": dict(rope_type="yarn", factor=2.0),
    "a ramp without length": dict(rope_type="yarn", factor=4.0, beta_fast=2.0, beta_slow=2.0, truncate=False),
    "an old context that no pair turns round in": dict(rope_type="yarn", factor=2.0,
                                                       original_max_position_embeddings=6),
    "not stretched": dict(rope_type="yarn", factor=1.0, original_max_position_embeddings=64),
    "linear": dict(type="linear", factor=2.5),
    "Llama 3's, the context left out": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                            high_freq_factor=4.0),
}


@pytest.mark.parametrize("theta", [500.0, 10000.0, 1e6])
@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize("name", LONG_FORMS)
def test_rotary_tables_equal_transformers(name, head_dim, theta):
    raw = make_config("qwen2", True, rope_theta=theta, rope_scaling=LONG_FORMS[name], head_dim=head_dim,
                      max_position_embeddings=64)
    config = parse_config(raw, "config.json")
    reference = Qwen2RotaryEmbedding(AutoConfig.for_model(**raw))
    frequencies = rope_frequencies(config)
    assert (frequencies / reference.inv_freq - 1).abs().max() < 1e-6
    positions = torch.arange(8)  # further on, the last bit of a frequency shows in the angle
    cos, sin = rope_tables(frequencies, positions, config.rope_attention_factor)
    expected_cos, expected_sin = reference(torch.zeros(1), positions[None])
    half = head_dim // 2
    sign = torch.cat((-torch.ones(half), torch.ones(half)))  # our sines have that of their half
    assert (cos[:, 0] - expected_cos[0]).abs().max() < 1e-6
    assert (sin[:, 0] * sign - expected_sin[0]).abs().max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", LONG_FORMS)
def test_logits_equal_transformers_before_and_after_saving(tiny_tokenizer, tmp_path, name, dialect):
    raw = make_config("qwen2", True, max_position_embeddings=64)
    raw[dialect] = dict(LONG_FORMS[name])
    if dialect == "rope_parameters":
        raw[dialect]["rope_theta"] = raw.pop("rope_theta")
    folder = write_checkpoint(tmp_path / "checkpoint", raw, tiny_tokenizer)
    save_checkpoint(tmp_path / "saved", load_model(folder), folder)
    ids = torch.randint(400, (100,), generator=torch.Generator().manual_seed(0))
    tree = Tree([ids.tolist()])
    for path in (folder, tmp_path / "saved"):
        model = load_model(path)
        with torch.no_grad():
            ours = model.logits(model(tree.ids, tree.positions, tree_attention(tree.end)))
            reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            theirs = reference(ids[None]).logits[0]
        assert (ours - theirs).abs().max() < 2e-4
    assert load_config(tmp_path / "saved") == load_config(folder)


def test_what_yarn_multiplies_with():
    """By hand: 0.1 ln 4 + 1, or what the file says."""
    raw = make_config("qwen2", True, rope_scaling=LONG_FORMS["Qwen2.5's"])
    assert math.isclose(parse_config(raw, "x").rope_scaling["attention_factor"], 1.138629, abs_tol=1e-6)
    raw = make_config("qwen2", True, rope_scaling=LONG_FORMS["all told"])
    assert parse_config(raw, "x").rope_scaling["attention_factor"] == 1.5
    raw = make_config("qwen2", True, rope_scaling=LONG_FORMS["DeepSeek's"])
    factor = parse_config(raw, "x").rope_scaling["attention_factor"]
    assert math.isclose(factor, 1.368888 / 1.184444, abs_tol=1e-6)


def test_the_context_is_what_config_json_says_unless_the_user_asks_for_another(make_folder):
    folder = make_folder("qwen2", True)
    assert load_config(folder).max_position_embeddings == 4096
    assert load_config(folder, context=8192).max_position_embeddings == 8192
    model = load_model(folder, context=100)
    assert model.config.max_position_embeddings == 100
    assert torch.equal(model.embed.weight, load_model(folder).embed.weight)


def test_qwens_long_form_has_a_long_context():
    """Its max_position_embeddings stays that of the short form."""
    scaling = dict(type="yarn", factor=4.0, original_max_position_embeddings=32768)
    raw = make_config("qwen2", True, max_position_embeddings=32768, rope_scaling=scaling)
    assert parse_config(raw, "x").max_position_embeddings == 131072
    assert parse_config(raw | {"max_position_embeddings": 200000}, "x").max_position_embeddings == 200000
    assert parse_config(raw, "x", context=5000).max_position_embeddings == 5000
    raw["rope_scaling"] = dict(type="linear", factor=4.0)
    assert parse_config(raw, "x").max_position_embeddings == 32768  # here it is that of the long form


def test_a_longer_context_may_meet_a_window():
    """A window of 4096 is not in use in a context of 4096. In one of 8192 it is, and is not implemented."""
    raw = make_config("mistral", True, sliding_window=4096)
    assert parse_config(raw, "config.json").max_position_embeddings == 4096
    with pytest.raises(BadInput, match="field 'sliding_window'"):
        parse_config(raw, "config.json", context=8192)
