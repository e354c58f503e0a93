"""What both training scripts do before their loop."""
from pathlib import Path
from typing import Any, Callable

import fast
from checkpoint import DTYPES, load_for_training, load_tokenizer, new_model, read_template_args
from checkpoint import results as results_of
from checkpoint.prompt import travelling_prompt
from formats.examples import Examples, read_examples, reference_table
from formats.turns import Turn
from model import Decoder
from plumbing import ranks
from plumbing.errors import BadInput
from plumbing.memory import print_budget
from plumbing.run import epoch_batches
from plumbing.settings import TrainConfig, check_out, lora_settings
from plumbing.table import StoredTable
from plumbing.threads import choose_threads

Results = dict[str, Callable[[Path], None]]  # what a run ends in: the name of a folder -> what writes it


def begin(config: TrainConfig) -> dict[str, Any]:
    """Meet the other ranks, and refuse an --out that cannot be begun or continued. -> the run's settings."""
    ranks.join(config.device, config.rank_timeout)
    settings = check_out(config)
    if not config.plain:
        fast.keep_freed_memory()
    return settings


def initial_model(config: TrainConfig) -> tuple[Decoder, Path]:
    """The model of train_sft.py's --model or --from-scratch, and the folder that its tokenizer comes from."""
    if (config.model is None) == (config.from_scratch is None):
        raise BadInput("give one of --model (a checkpoint) and --from-scratch (a config.json)")
    lora = lora_settings(config)
    if config.model:
        model = load_for_training(
            config.model, config.device, config.context, lora, config.adapter, config.seed)
        return model, Path(config.model)
    if lora or config.adapter:
        raise BadInput("adapters change the weights of a trained model; give --model, not --from-scratch")
    path = Path(config.from_scratch)
    if path.name != "config.json" or not path.is_file():
        raise BadInput(f"--from-scratch {path}: is no file named config.json; give one, beside its tokenizer")
    return new_model(path.parent, config.device, config.context, config.seed), path.parent


def prepare(config: TrainConfig, model: Decoder, folder: str | Path,
            read: Callable[[dict, str], Turn]) -> tuple[Examples, Examples | None, Results]:
    """Make the model ready to be trained, and read what it is trained on.

    folder: the tokenizer's. read: makes a Turn of a row (formats/turns.py)
    -> the examples of --train and of --validation, and what the run will end in
    """
    choose_threads(model)
    if not config.plain:
        fast.speed_up(model)
    model.checkpoint_activations = config.checkpoint_activations
    tokenizer = load_tokenizer(folder, config.system, read_template_args(config.template_args))
    prompt = travelling_prompt(config.prompt_file, config.train, folder, config.adapter)
    context = model.config.max_position_embeddings
    train, validation = read_examples(
        config.train, config.validation, read, tokenizer, config.micro_tokens, context, prompt)
    results = results_of(model, folder, prompt, DTYPES[config.save_dtype], config.merge)
    return train, validation, results


def plan(config: TrainConfig, model: Decoder, train: Examples,
         pack: Callable) -> tuple[int, Callable[[int], list[int]]]:
    """(how many steps, step -> the numbers of its examples). Prints what they come to, and the memory needed.

    pack: makes trees of examples (data.pack)
    """
    steps, batch_of = epoch_batches(
        train.kept, config.batch_size, config.epochs, config.max_steps, config.seed)
    first_step = sum(len(batch.tree) for batch in pack(train.units(batch_of(0)), config.micro_tokens))
    print_budget(model, len(train.kept), steps, config.batch_size, config.micro_tokens, first_step,
                 config.checkpoint_activations, config.adamw_8bit)
    return steps, batch_of


def table_of(config: TrainConfig, model: Decoder, pairs: Examples) -> StoredTable:
    """The table beside the pairs that keeps the reference's log-probabilities (train_dpo.py)."""
    flags = (config.context, config.system, config.template_args, config.plain)
    return reference_table(model, config.model, config.adapter, config.batch_size, flags, pairs)
