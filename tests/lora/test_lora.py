"""Adapters against PEFT's on the same weights: outputs, losses, gradients, and the files in both directions."""
import dataclasses
import json
import math
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_fuzz import mutate_value
from test_model import family_tree, logits_of, random_ids, reference_model
from test_training import (
    caches,
    dpo_config,
    metrics,
    in_a_child,
    own_signals,  # noqa: F401, a fixture
    pair_rows,
    run_here,
    same_run,
    sft_config,
    sft_rows,
    small_run,
    write,
)
from torch.utils._python_dispatch import TorchDispatchMode

import fast
import lora
import train_dpo
import train_sft
from checkpoint import PROMPT_FILE, load_config, load_for_training, load_model, merge_adapter, save_checkpoint
from checkpoint.adapter import CONFIG_FILE, WEIGHTS_FILE, adapter_layout, read_adapter, save_adapter
from checkpoint.flags import SamplerConfig, ServedConfig
from model import Decoder, Tree
from plumbing.errors import BadInput
from rprm import response_logprobs, sft_loss
from rprm import load_local_sampler

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def peft_model(folder: Path, modules: list[str], **settings) -> PeftModel:
    """PEFT's model, whose B are not zero, as they would be at the start."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings, target_modules=modules)
    model = get_peft_model(reference_model(folder), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.05, generator=generator)
    return model


@pytest.fixture
def save_peft(tmp_path):
    """save_peft(folder, modules, **settings) -> PEFT's model, and its adapter's folder"""
    def save(folder: Path, modules: list[str], **settings) -> tuple[PeftModel, Path]:
        model = peft_model(folder, modules, **settings)
        model.save_pretrained(tmp_path / "peft")
        return model, tmp_path / "peft"
    return save


def peft_logits(model: PeftModel, tree: Tree) -> torch.Tensor:
    """Logits at every token of a tree, each sequence by itself."""
    logits = torch.empty(len(tree), model.config.vocab_size)
    for path in tree.paths:
        logits[path] = model(tree.ids[path][None]).logits[0]
    return logits


# ---------------------------------------------------------------------------------------------- the equation

@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("is_fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("family, tied, modules, settings", [
    ("qwen2", True, ATTENTION + MLP, {}),
    ("llama", False, ["q_proj", "k_proj", "v_proj", "down_proj"], {"use_rslora": True}),
])
def test_logits_losses_and_gradients_are_those_of_peft(
    make_folder, save_peft, monkeypatch, family, tied, modules, settings, is_fast, checkpointed
):
    """To 1e-5 in fp32, for every adapter of PEFT, and nothing else has a gradient."""
    monkeypatch.setattr("fast.kernels.ONEDNN_SIZE", 0)  # as for a large model
    folder = make_folder(family, tied)
    theirs, adapter = save_peft(folder, modules, **settings)
    ours = load_for_training(folder, "cpu", adapter=adapter)
    if is_fast:
        fast.speed_up(ours)
    ours.checkpoint_activations = checkpointed

    tree = Tree(family_tree())
    torch.testing.assert_close(logits_of(ours, tree), peft_logits(theirs, tree), atol=1e-5, rtol=1e-5)

    starts = [3] * len(tree.paths)
    n_tokens = sum(len(path) - 3 for path in tree.paths)
    loss = sft_loss(response_logprobs(ours, tree, starts), n_tokens)
    loss.backward()
    their_loss = 0.0
    for path in tree.paths:
        logits = theirs(tree.ids[path][None]).logits[0]
        their_loss += torch.nn.functional.cross_entropy(logits[2:-1], tree.ids[path[3:]], reduction="sum")
    their_loss /= n_tokens
    their_loss.backward()
    torch.testing.assert_close(loss, their_loss, atol=1e-5, rtol=1e-5)

    parameters = dict(ours.named_parameters())
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    rows_of = adapter_layout(ours.config, lora.lora_of(ours))
    assert len(rows_of) == len(gradients) == 2 * 2 * len(modules)  # A and B, in two layers
    for name, rows in rows_of.items():
        gradient = parameters[rows.parameter].grad[rows.first:rows.first + rows.shape[0]]
        expected = gradients[name.replace(".weight", ".default.weight")]
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4, msg=name)
    frozen = [p for name, p in parameters.items() if "lora_" not in name]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


class Shapes(TorchDispatchMode):
    """The shapes of the products whose sums go over more than `rank` numbers."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank
        self.found = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **kwargs or {})
        if operation.__name__.startswith(("mm", "addmm")) and args[-2].shape[1] > self.rank:
            self.found.add(tuple(out.shape))
        return out


@pytest.mark.parametrize("has_adapters", [False, True])
def test_no_gradient_of_a_frozen_weight_is_computed(tiny_folder, monkeypatch, has_adapters):
    """In the fast backward pass no product has the shape of a weight; without adapters, each weight's has."""
    monkeypatch.setattr("fast.kernels.ONEDNN_SIZE", 0)
    settings = lora.LoRA(rank=4, alpha=8) if has_adapters else None
    model = fast.speed_up(load_for_training(tiny_folder, "cpu", lora=settings))
    sequences = [random_ids(70), random_ids(70, 1)]
    logprobs = response_logprobs(model, Tree(sequences), [50, 50])
    with Shapes(rank=4) as shapes:
        logprobs.sum().backward()
    weights = {tuple(p.shape) for name, p in model.named_parameters() if p.dim() == 2 and "lora_" not in name}
    assert len(weights) == 5
    assert weights & shapes.found == (set() if has_adapters else weights)


def test_new_adapters_change_nothing_and_are_drawn_as_pefts(tiny_folder):
    settings = lora.LoRA(rank=32, alpha=64)
    one, two, other = (load_for_training(tiny_folder, "cpu", lora=settings, seed=seed) for seed in (0, 0, 1))
    tree = Tree([random_ids(30)])
    assert torch.equal(logits_of(one, tree), logits_of(load_model(tiny_folder), tree))
    theirs = get_peft_model(reference_model(tiny_folder), LoraConfig(r=32, target_modules=ATTENTION + MLP))
    drawn = {name: p for name, p in theirs.named_parameters() if "lora_A" in name}
    for name, rows in adapter_layout(one.config, settings).items():
        a = dict(one.named_parameters())[rows.parameter][rows.first:rows.first + rows.shape[0]]
        if "lora_A" in name:
            expected = drawn[name.replace(".weight", ".default.weight")]
            bound = expected.shape[1] ** -0.5
            assert a.shape == expected.shape and a.abs().max() < bound
            assert a.std().item() == pytest.approx(expected.std().item(), rel=0.1)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, two.get_parameter(name))
        assert torch.equal(parameter, other.get_parameter(name)) == (not name.endswith("lora_A"))


@pytest.mark.parametrize("family, tied", [("qwen2", True), ("qwen3", False)])
def test_merged_is_unmerged(make_folder, tmp_path, family, tied):
    """Merged when a training saves, when a checkpoint is loaded with its adapter, and not merged."""
    folder = make_folder(family, tied)
    model = load_for_training(folder, "cpu", lora=lora.LoRA(4, 6.0, ("qkv", "out", "down")))
    randomize(model)
    save_adapter(tmp_path / "adapter", model, folder)
    save_checkpoint(tmp_path / "model", model, folder)
    merged = load_model(folder)
    merge_adapter(merged, tmp_path / "adapter")
    tree = Tree(family_tree())
    expected = logits_of(model, tree)
    assert (expected - logits_of(load_model(folder), tree)).abs().max() > 0.1
    for other in (merged, load_model(tmp_path / "model")):
        torch.testing.assert_close(logits_of(other, tree), expected, atol=1e-5, rtol=1e-5)


def randomize(model: Decoder) -> None:
    """As after some training: B is not zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0.0, 0.1)


# ---------------------------------------------------------------------------------------------- files

@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian", "lora_dropout": 0.1}])
@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], ATTENTION + MLP])
def test_an_adapter_of_peft_is_merged(tiny_folder, save_peft, modules, settings):
    """Also one for some of the parts of a product."""
    theirs, adapter = save_peft(tiny_folder, modules, **settings)
    ours = load_model(tiny_folder)
    merge_adapter(ours, adapter)
    tree = Tree([random_ids(40)])
    torch.testing.assert_close(logits_of(ours, tree), peft_logits(theirs.eval(), tree), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [lora.TARGETS, ("qkv", "down")])
def test_a_trained_adapter_opens_in_peft_and_merged_in_transformers(tmp_path, tiny_folder, targets, capsys):
    (tmp_path / "train.prompt.txt").write_text("Judge: {problem} {previous_steps} {now_step}\n")
    train_sft.main(sft_config(tmp_path, tiny_folder, sft_rows(8), lora_rank=4, lora_targets=targets, lr=1e-2,
                              merge=True, save_dtype="bfloat16"))
    out = tmp_path / "out"
    printed = capsys.readouterr().out
    assert f"adapter: {out / 'adapter'}, model: {out / 'model'}" in printed
    assert "are trained, in adapters of rank 4" in printed and "adapters, their gradients and both" in printed

    opened = PeftModel.from_pretrained(reference_model(tiny_folder), out / "adapter")
    ours = load_model(tiny_folder)
    merge_adapter(ours, out / "adapter")
    tree = Tree([random_ids(40)])
    logits = logits_of(ours, tree)
    torch.testing.assert_close(logits, peft_logits(opened, tree), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, reference_model(out / "model")(tree.ids[None]).logits[0], atol=0.1, rtol=0.1)
    assert (logits - logits_of(load_model(tiny_folder), tree)).abs().max() > 0.1
    assert json.loads((out / "adapter" / CONFIG_FILE).read_text())["base_model_name_or_path"] == str(tiny_folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", PROMPT_FILE):
        assert (out / "adapter" / name).is_file() and (out / "model" / name).is_file(), name


REFUSED = {
    "use_dora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2}, "modules_to_save": ["lm_head"],
    "bias": "all", "lora_bias": True, "layers_to_transform": [0], "layer_replication": [[0, 1]],
    "fan_in_fan_out": True, "init_lora_weights": "pissa", "trainable_token_indices": [1], "use_qalora": True,
    "a_field_of_the_future": 3,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_folder) -> Path:
    """An adapter's folder. Read only."""
    model = load_for_training(tiny_folder, "cpu", lora=lora.LoRA(4, 6.0))
    randomize(model)
    folder = tmp_path_factory.mktemp("made") / "adapter"
    save_adapter(folder, model, tiny_folder)
    return folder


def altered(made: Path, folder: Path, config: dict | None = None, tensors: dict | None = None) -> Path:
    shutil.copytree(made, folder, dirs_exist_ok=True)
    if config:
        raw = json.loads((made / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(raw | config))
    if tensors is not None:
        save_file(tensors, folder / WEIGHTS_FILE)
    return folder


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_is_not_implemented_is_refused_by_name(tmp_path, tiny_folder, made, field):
    adapter = altered(made, tmp_path / "adapter", {field: REFUSED[field]})
    with pytest.raises(BadInput, match=f"{CONFIG_FILE}: field '{field}'.*is not implemented"):
        merge_adapter(load_model(tiny_folder), adapter)


@pytest.mark.parametrize("config, said", [
    ({"peft_type": "LOHA"}, "field 'peft_type': 'LOHA' is not implemented"), ({"r": 0}, "out of range"),
    ({"r": "4"}, "field 'r': expected a whole number"), ({"lora_alpha": None}, "field 'lora_alpha': expected"),
    ({"r": 8}, "28 misshapen: .*lora_A.weight \\[4, 64\\], not \\[8, 64\\]"),
])
def test_a_config_that_does_not_fit_is_refused(tmp_path, tiny_folder, made, config, said):
    with pytest.raises(BadInput, match=said):
        merge_adapter(load_model(tiny_folder), altered(made, tmp_path / "adapter", config))


def test_a_config_as_peft_writes_it_is_read(tmp_path, tiny_folder, made):
    """With all of its fields, most of them at defaults that ask for nothing."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION, exclude_modules=["lm_head"]).to_dict()
    config |= {"peft_type": "LORA", "target_modules": ATTENTION, "exclude_modules": ["lm_head"]}
    assert len(config) > 30
    merge_adapter(load_model(tiny_folder), altered(made, tmp_path / "adapter", config))


def test_tensors_that_do_not_fit_are_refused(tmp_path, tiny_folder, made):
    tensors = load_file(made / WEIGHTS_FILE)
    name = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    without = {key: tensor for key, tensor in tensors.items() if key != name}
    head = {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}
    other_shape = {name: torch.zeros(64, 4)}
    for changed, said in ((without, f"1 missing: {name}"), (tensors | head, "1 unexpected: .*lm_head"), ({}, "no tensors"),
                          (tensors | other_shape, "1 misshapen: .*k_proj.lora_B.weight \\[64, 4\\], not \\[32, 4\\]")):
        with pytest.raises(BadInput, match=said):
            merge_adapter(load_model(tiny_folder), altered(made, tmp_path / "adapter", tensors=changed))


def test_a_pickle_is_not_opened_and_a_folder_without_adapters_is_named(tmp_path, tiny_folder, made):
    adapter = altered(made, tmp_path / "adapter")
    (adapter / WEIGHTS_FILE).rename(adapter / "adapter_model.bin")
    with pytest.raises(BadInput, match=f"{WEIGHTS_FILE}: no such file; save the adapter as safetensors"):
        merge_adapter(load_model(tiny_folder), adapter)
    with pytest.raises(BadInput, match=f"absent/{CONFIG_FILE}: no such file"):
        merge_adapter(load_model(tiny_folder), tmp_path / "absent")


@pytest.mark.slow
def test_a_spoilt_adapter_is_used_or_refused_in_one_line(tmp_path, tiny_folder, made):
    raw = json.loads((made / CONFIG_FILE).read_text())
    adapter = altered(made, tmp_path / "adapter")
    config = load_config(tiny_folder)
    outcomes = set()
    for seed in range(300):
        (adapter / CONFIG_FILE).write_text(json.dumps(mutate_value(random.Random(seed), raw)))
        try:
            read_adapter(adapter, config)
            outcomes.add("used")
        except BadInput:
            outcomes.add("refused")
    assert outcomes == {"used", "refused"}


# ---------------------------------------------------------------------------------------------- training

@pytest.mark.slow
@pytest.mark.parametrize("script", [train_sft, train_dpo])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, tiny_folder, script):
    """Killed at some of its file operations, again soon after its resumption. Checkpoints hold the adapters
    and their moments alone.
    """
    flags = dict(lora_rank=4, merge=True, save_every=1)
    script.main(small_run(script, tmp_path, tiny_folder, "whole", **flags))
    out = tmp_path / "killed"
    resume = lambda: script.main(small_run(script, tmp_path, tiny_folder, "killed", resume=True, **flags))  # noqa: E731
    for die_at in (12, 33):
        assert in_a_child(resume, die_at) == -signal.SIGKILL
        assert in_a_child(resume, die_at % 3 + 1) == -signal.SIGKILL
        assert in_a_child(resume) == 0
        assert same_run(tmp_path / "whole", out) == []
        [file] = out.glob("checkpoints/*/*.safetensors")
        assert len(load_file(file)) == 3 * 2 * 4 * 2 and all("lora_" in name for name in load_file(file))
        base = load_model(tiny_folder)
        merge_adapter(base, out / "adapter")
        trained = load_model(out / "model")
        for name, parameter in trained.named_parameters():
            torch.testing.assert_close(parameter, base.get_parameter(name), atol=1e-6, rtol=1e-6)
        shutil.rmtree(out)


def test_another_base_is_not_resumed(tmp_path, tiny_folder):
    folder = tmp_path / "base"
    shutil.copytree(tiny_folder, folder)
    first = sft_config(tmp_path, folder, sft_rows(8), lora_rank=4)
    train_sft.main(first)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(BadInput, match="the content of --model is not what the run was begun with"):
        train_sft.main(dataclasses.replace(first, resume=True, overwrite=False))


def test_adapters_learn_and_the_base_stays(tmp_path, tiny_folder, monkeypatch):
    models = []
    load = load_for_training
    monkeypatch.setattr("formats.training.load_for_training", lambda *given: models.append(load(*given)) or models[0])
    train_sft.main(sft_config(tmp_path, tiny_folder, sft_rows(8), batch_size=8, epochs=30, lora_rank=8, lr=2e-2))
    losses = [row["loss"] for row in metrics(tmp_path / "out")]
    assert losses[-1] < losses[0] - 2
    assert not (tmp_path / "out/model").exists()
    base = load_model(tiny_folder)
    for name, parameter in base.named_parameters():
        assert torch.equal(models[0].get_parameter(name), parameter), name


@pytest.mark.slow
def test_the_reference_is_the_model_with_the_adapters_it_starts_from(tmp_path, tiny_folder, made):
    """New adapters change nothing, so their table is that of full training. Those of --adapter have another.

    In each case the first loss is log 2: a stale reference would show.
    """
    other = altered(made, tmp_path / "other", tensors={name: 2 * t for name, t in load_file(made / WEIGHTS_FILE).items()})
    for changes, n in (({}, 1), (dict(lora_rank=4), 1), (dict(adapter=str(made)), 2), (dict(adapter=str(other)), 3)):
        train_dpo.main(dpo_config(tmp_path, tiny_folder, pair_rows(8), **changes))
        [row] = metrics(tmp_path / "dpo")
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert len(caches(tmp_path)) == n
    tables = [np.load(path) for path in caches(tmp_path)]
    assert all(np.abs(a - b).max() > 0.1 for a, b in ((tables[0], tables[1]), (tables[1], tables[2])))


def test_training_goes_on_from_an_adapter(tmp_path, tiny_folder, made):
    """With its rank, alpha and targets; the first loss is that of the merged model."""
    train_sft.main(sft_config(tmp_path, tiny_folder, sft_rows(4), adapter=str(made)))
    [row] = metrics(tmp_path / "out")
    merged = load_for_training(tiny_folder, "cpu", adapter=made)
    save_checkpoint(tmp_path / "merged", merged, tiny_folder)
    train_sft.main(sft_config(tmp_path, tmp_path / "merged", sft_rows(4), out=str(tmp_path / "full")))
    assert row["loss"] == pytest.approx(metrics(tmp_path / "full")[0]["loss"], rel=1e-5)
    before, after = (json.loads((path / CONFIG_FILE).read_text()) for path in (made, tmp_path / "out/adapter"))
    assert before == after
    one, two = (load_file(path / WEIGHTS_FILE) for path in (made, tmp_path / "out/adapter"))
    assert one.keys() == two.keys() and not any(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_training_does_not_go_on_from_adapters_for_parts_of_a_product(tmp_path, tiny_folder, save_peft):
    _, adapter = save_peft(tiny_folder, ["q_proj", "v_proj"])
    with pytest.raises(BadInput, match=r"has adapters for some of self_attn.k_proj, self_attn.q_proj, self_attn.v_proj"):
        train_sft.main(sft_config(tmp_path, tiny_folder, sft_rows(4), adapter=str(adapter)))


@pytest.mark.parametrize("flags, said", [
    (["--lora-alpha", 8], "give --lora-rank too"), (["--lora-targets", "qkv"], "give --lora-rank too"),
    (["--merge"], "give --lora-rank or --adapter too"), (["--lora-rank", 4, "--lora-targets", "q_proj"], "invalid choice"),
    (["--lora-rank", 4, "--adapter", "a"], "give one of them"), (["--lora-rank", 0], "out of range"),
])
def test_flags_that_do_not_go_together_are_refused(tmp_path, tiny_folder, capsys, flags, said):
    train = write(tmp_path / "t.jsonl", sft_rows(2))
    assert run_here(train_sft, "--model", tiny_folder, "--train", train, "--out", tmp_path / "out", *flags) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_adapters_from_scratch_are_refused(tmp_path, tiny_folder):
    scratch = str(tiny_folder / "config.json")
    with pytest.raises(BadInput, match="give --model, not --from-scratch"):
        train_sft.main(sft_config(tmp_path, None, sft_rows(1), from_scratch=scratch, lora_rank=4))


# ---------------------------------------------------------------------------------------------- inference

def test_sampling_merges_the_adapter_and_asks_in_its_words(tmp_path, tiny_folder, made, capsys):
    adapter = altered(made, tmp_path / "adapter")
    (adapter / PROMPT_FILE).write_text("Judge: {problem} {previous_steps} {now_step}\n")
    config = SamplerConfig(model=str(tiny_folder), adapter=str(adapter), device="cpu")
    sampler = load_local_sampler(config, 1, force=True)
    expected = load_model(tiny_folder)
    merge_adapter(expected, adapter)
    for p, q in zip(sampler.model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)
    assert sampler.prompt.text.startswith("Judge: {problem}")
    load_local_sampler(dataclasses.replace(config, adapter=str(made)), 1, force=True)  # made without words
    assert f"verify.txt, as there is no {tiny_folder / PROMPT_FILE}" in capsys.readouterr().out


def test_an_adapter_has_no_meaning_with_a_server():
    with pytest.raises(BadInput, match="--adapter has no meaning with --server"):
        ServedConfig(model="m", adapter="a", server="http://localhost:1", tokenizer="t")
