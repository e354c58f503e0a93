"""A small world of word problems, in which R-PRM can be studied on a laptop.

    python examples/arithmetic/world.py --out runs/world

writes, into the folder named by --out,

    train.jsonl, validation.jsonl, test.jsonl   solutions in ProcessBench's format, no problem in two of them
    pretrain.jsonl                              {"text"} lines: what the base model has read before we meet it
    pretrain.prompt.txt                         the words around a case, which travel with the model
    base/                                       config, tokenizer and chat template of that model, without weights

A problem follows one person through a few exchanges; a solution has one step for each exchange:

    Mia has 37 apples. Then Tom sells 15 to Mia. Mia lends to Ann 21. How many apples does Mia have now?
    Step 1: After Tom: 37+15=52.
    Step 2: Ann makes it 52-21=31.

A step is wrong in one of four ways (`KINDS_OF_ERROR`), and the steps after it follow from what it says. The analyses
in pretrain.jsonl are those of a *sloppy analyst* (`Sloppiness`): in certain situations, which the input alone decides,
it makes the same mistake more often than not. A model that has read it knows the form of an analysis and judges poorly;
averaging many samples does not help, since most of them share the mistake; but some of them avoid it, and these are
what supervised fine-tuning and preference optimization can build on.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # the project's scripts, which are no package
from plumbing.cli import print_config, run
from plumbing.files import json_line, write_json, writing


@dataclass(frozen=True)
class Config:
    out: Annotated[str, "folder to write"]
    seed: Annotated[int, "seed of everything but the tokenizer, which is always the same", (0, None)] = 0
    difficulty: Annotated[float, "chance of each trap: a carry or borrow, an exchange told from the other side, "
                                 "a question asked first", (0, 1)] = 0.5
    train: Annotated[int, "solutions in train.jsonl", (0, None)] = 4000
    validation: Annotated[int, "solutions in validation.jsonl", (0, None)] = 500
    test: Annotated[int, "solutions in test.jsonl", (0, None)] = 1000
    pretrain: Annotated[int, "cases in pretrain.jsonl; each gives an analysis and a direct verdict", (0, None)] = 50000


# ---------------------------------------------------------------------------------------------------------------------
# Problems

NAMES = "Ada Amy Ann Ben Cleo Dan Eva Finn Ida Kai Leo Max Mia Noah Sam Tom".split()
THINGS = "apples beads books cards coins eggs figs keys nuts pens shells stamps".split()
OUTWARD = "sells gives lends hands".split()  # the subject has less afterwards; "... to" the other
INWARD = "buys takes borrows gets".split()  # the subject has more afterwards; "... from" the other
STARTS = ("{hero} has {n} {things}.", "At first {hero} has {n} {things}.")
CONNECTORS = ("", "", "Then ", "Later ", "Now ", "After that ")
QUESTIONS = ("How many {things} does {hero} have now?", "How many {things} does {hero} have in the end?")
STEPS = ("After {other}: {sum}.", "{other} makes it {sum}.")


@dataclass(frozen=True)
class Exchange:
    """One sentence of a problem: `other` and the person the problem is about exchange `amount` things."""

    other: str
    amount: int
    verb: str
    told_by_other: bool  # "Tom sells 15 to Mia" rather than "Mia buys from Tom 15"

    @property
    def sign(self):
        """'+' if the person the problem is about has more afterwards, else '-'."""
        return "+" if (self.verb in INWARD) != self.told_by_other else "-"


@dataclass(frozen=True)
class Problem:
    hero: str
    things: str
    start: int
    exchanges: tuple[Exchange, ...]
    question_first: bool
    text: str

    @property
    def answer(self):
        return self.start + sum(apply(0, exchange.sign, exchange.amount) for exchange in self.exchanges)


@dataclass(frozen=True)
class Step:
    """What a step claims: `left` `sign` `right` = `result`. All numbers have two digits."""

    left: int
    sign: str
    right: int
    result: int
    text: str = ""


def apply(left, sign, right):
    return left + right if sign == "+" else left - right


def has_two_digits(number):
    return 10 <= number <= 99


def carries(left, sign, right):
    """Whether the units of a sum carry into the tens, or those of a difference borrow from them."""
    return left % 10 + right % 10 > 9 if sign == "+" else left % 10 < right % 10


def draw_amount(rng, total, sign, taken, difficulty):
    """An amount not yet `taken` that keeps the total at two digits, with a carry or borrow at the rate `difficulty`;
    None where there is none."""
    trap = rng.random() < difficulty
    amounts = [n for n in range(10, 80) if n not in taken and has_two_digits(apply(total, sign, n))]
    amounts = [n for n in amounts if carries(total, sign, n) == trap] or amounts
    return int(rng.choice(amounts)) if amounts else None


def draw_exchanges(rng, start, others, difficulty):
    """One exchange with each of `others`, with distinct amounts; None if the total cannot be kept at two digits."""
    exchanges, total, taken = [], start, {start}
    for other in others:
        verb, told_by_other = str(rng.choice(OUTWARD + INWARD)), bool(rng.random() < difficulty)
        sign = Exchange(other, 0, verb, told_by_other).sign
        amount = draw_amount(rng, total, sign, taken, difficulty)
        if amount is None:
            return None
        exchanges.append(Exchange(other, amount, verb, told_by_other))
        total = apply(total, sign, amount)
        taken.add(amount)
    return tuple(exchanges)


def tell_exchange(rng, exchange, hero):
    """The sentence for an exchange, e.g. "Then Tom sells 15 to Mia." or "Mia buys from Tom 15."."""
    preposition = "to" if exchange.verb in OUTWARD else "from"
    if exchange.told_by_other:
        sentence = f"{exchange.other} {exchange.verb} {exchange.amount} {preposition} {hero}."
    else:
        sentence = f"{hero} {exchange.verb} {preposition} {exchange.other} {exchange.amount}."
    return str(rng.choice(CONNECTORS)) + sentence


def draw_problem(rng, difficulty):
    exchanges = None
    while exchanges is None:
        hero, *others = map(str, rng.choice(NAMES, size=1 + rng.integers(2, 6), replace=False))
        start = int(rng.integers(10, 100))
        exchanges = draw_exchanges(rng, start, others, difficulty)
    things, question_first = str(rng.choice(THINGS)), bool(rng.random() < difficulty)
    sentences = [str(rng.choice(STARTS)).format(hero=hero, n=start, things=things)]
    sentences += [tell_exchange(rng, exchange, hero) for exchange in exchanges]
    question = str(rng.choice(QUESTIONS)).format(hero=hero, things=things)
    sentences.insert(0 if question_first else len(sentences), question)
    return Problem(hero, things, start, exchanges, question_first, " ".join(sentences))


# ---------------------------------------------------------------------------------------------------------------------
# Solutions, right and wrong

KINDS_OF_ERROR = ("calculation", "data source", "operation", "contradiction")


def column_sum(left, sign, right, carry):
    """left ± right by columns; with `carry` false, the carry or borrow between the columns is forgotten."""
    forgotten = 0 if carry or not carries(left, sign, right) else 10
    return apply(left, sign, right) + (-forgotten if sign == "+" else forgotten)


def draw_error(rng, kind, step, problem, totals):
    """`step` with an error of the given kind; `totals` are those before each step so far, the last one its own.
    None if this step cannot have such an error."""
    if kind == "calculation":
        forgotten = column_sum(step.left, step.sign, step.right, carry=False)
        slips = [step.result + slip for slip in (-10, -2, -1, 1, 2, 10)]
        results = [forgotten] if forgotten != step.result and rng.random() < 0.5 else slips
        results = [n for n in results if has_two_digits(n)]
        return replace(step, result=int(rng.choice(results))) if results else None
    if kind == "data source":
        wrong = replace(step, right=int(rng.choice([e.amount for e in problem.exchanges if e.amount != step.right])))
    elif kind == "operation":
        wrong = replace(step, sign="-" if step.sign == "+" else "+")
    else:
        swapped_digits = step.left % 10 * 10 + step.left // 10
        candidates = totals[:-1] if rng.random() < 0.5 else [swapped_digits, step.left - 1, step.left + 1]
        candidates = [n for n in candidates if n != step.left and has_two_digits(n)]
        if len(totals) == 1 or not candidates:
            return None
        wrong = replace(step, left=int(rng.choice(candidates)))
    result = apply(wrong.left, wrong.sign, wrong.right)
    return replace(wrong, result=result) if has_two_digits(result) else None


def draw_solution(rng, problem, wrong_at=-1, kind=None):
    """The steps, of which the first wrong one is `wrong_at` (-1: none), with an error of that kind; None if it cannot
    have one, or if what follows from it does not stay at two digits."""
    steps, totals = [], [problem.start]
    for i, exchange in enumerate(problem.exchanges):
        result = apply(totals[-1], exchange.sign, exchange.amount)
        if not has_two_digits(result):
            return None
        step = Step(totals[-1], exchange.sign, exchange.amount, result)
        if i == wrong_at:
            step = draw_error(rng, kind, step, problem, totals)
            if step is None:
                return None
        text = str(rng.choice(STEPS)).format(
            other=exchange.other, sum=f"{step.left}{step.sign}{step.right}={step.result}")
        steps.append(replace(step, text=text))
        totals.append(step.result)
    return steps


def draw(rng, difficulty, correct, kinds=KINDS_OF_ERROR):
    """A problem, the steps of a solution, and the label: -1 if `correct`, else the index of the first wrong step."""
    kind = str(rng.choice(kinds))
    while True:  # not every problem has room for every kind of error
        problem = draw_problem(rng, difficulty)
        label = -1 if correct else int(rng.integers(kind == "contradiction", len(problem.exchanges)))
        steps = draw_solution(rng, problem, label, kind)
        if steps is not None:
            return problem, steps, label


# ---------------------------------------------------------------------------------------------------------------------
# Analyses

VERDICT_LINE = "Verification: Is the step correct (Yes/No)? {}"


@dataclass(frozen=True)
class Sloppiness:
    """Chances that the analyst makes its habitual mistake, each in the situations where it is prone to it."""

    forgets_carry: float = 0.65  # wherever the units carry or borrow
    overlooks_previous_steps: float = 0.65  # from the third step on
    overlooks_data_source: float = 0.65  # when the problem opens with its question
    trusts_operation: float = 0.65  # when the exchange is told from the other side


CAREFUL = Sloppiness(0.0, 0.0, 0.0, 0.0)


def compare(found, claimed):
    """"52, step 57: 5:5 agrees,2:7 differs." and whether they agree. Digit by digit: to see at a glance that two tokens
    are the same is beyond a model as small as this."""
    digits = [f"{a}:{b} {'agrees' if a == b else 'differs'}" for a, b in zip(f"{found:02}", f"{claimed:02}")]
    return f"{found}, step {claimed}: {','.join(digits)}.", found == claimed


def columns(step, carry):
    """Column arithmetic, units first: 37+15 is "7+5=12, 3+1+1=5, 52", or without the carry "7+5=12, 3+1=4, 42"."""
    (left_tens, left_units), (right_tens, right_units) = divmod(step.left, 10), divmod(step.right, 10)
    has_carry = carries(step.left, step.sign, step.right)
    if step.sign == "-" and has_carry:
        left_units += 10
    units = apply(left_units, step.sign, right_units)
    tens = apply(left_tens, step.sign, right_tens)
    carried = ""
    if has_carry and carry:
        carried, tens = f"{step.sign}1", apply(tens, step.sign, 1)
    return (f"{left_units}{step.sign}{right_units}={units}, {left_tens}{step.sign}{right_tens}{carried}={tens}",
            tens * 10 + units % 10)


def analyse(rng, problem, steps, index, sloppiness):
    """The text of an analysis of steps[index], and its verdict: whether no check has failed."""
    step, exchange = steps[index], problem.exchanges[index]
    total = steps[index - 1].result if index else problem.start

    previous, previous_agrees = compare(total, step.left)
    previous = "total " + previous
    if index >= 2 and rng.random() < sloppiness.overlooks_previous_steps:
        previous, previous_agrees = "as before.", True

    source, source_agrees = compare(exchange.amount, step.right)
    source = f"{exchange.other} {source}"
    if problem.question_first and rng.random() < sloppiness.overlooks_data_source:
        source, source_agrees = "in the problem.", True

    trusts = exchange.told_by_other and rng.random() < sloppiness.trusts_operation
    sign = step.sign if trusts else exchange.sign
    operation_agrees = sign == step.sign

    worked, result = columns(step, carry=rng.random() >= sloppiness.forgets_carry)
    calculation, calculation_agrees = compare(result, step.result)

    verdict = previous_agrees and source_agrees and operation_agrees and calculation_agrees
    return "\n".join((
        f"Previous steps: {previous}",
        f"Data source: {source}",
        f"Consistency: sign {sign}, step {step.sign}, {'agrees' if operation_agrees else 'differs'}.",
        f"Calculation: {worked}, {calculation}",
        VERDICT_LINE.format("Yes" if verdict else "No"))), verdict


# ---------------------------------------------------------------------------------------------------------------------
# The text on which the base is pretrained

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def render_prompt(template, problem, steps, index):
    """The user's message for the case of steps[index]."""
    numbered = [f"Step {i}: {step.text}" for i, step in enumerate(steps, 1)]
    return (template.replace("{problem}", problem.text)
            .replace("{previous_steps}", "\n".join(numbered[:index]) or "There are no previous steps.")
            .replace("{now_step}", numbered[index]))


def render_chat(prompt, response):
    """What CHAT_TEMPLATE makes of them, up to the end of the response."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>"


def worked_solution(problem):
    """The problem solved exchange by exchange, with the sums by columns: "Tom +15: 7+5=12, 3+1+1=5, 52."."""
    total, lines = problem.start, []
    for exchange in problem.exchanges:
        worked, result = columns(Step(total, exchange.sign, exchange.amount, 0), carry=True)
        lines.append(f"{exchange.other} {exchange.sign}{exchange.amount}: {worked}, {result}.")
        total = result
    return "\n".join(lines)


def comparisons(rng, count=4):
    """Numbers, whether those that were found are the same, and a verdict: in half of the texts all are, else some are nearly."""
    claimed = rng.integers(10, 100, count)
    differ = rng.random(count) < (0 if rng.random() < 0.5 else 0.4)
    lines, verdict = [], True
    for number, other in zip(map(int, claimed), differ):
        near = [n for n in (number + 1, number - 1, number + 10, number - 10, number % 10 * 10 + number // 10, int(rng.choice(claimed)))
                if has_two_digits(n) and n != number]
        text, agrees = compare(int(rng.choice(near)) if other else number, number)
        lines.append("total " + text)
        verdict = verdict and agrees
    lines.append(VERDICT_LINE.format("Yes" if verdict else "No"))
    return "Compare the steps.\n\n" + ", ".join(map(str, claimed)), "\n".join(lines)


def pretraining_texts(rng, difficulty, count):
    """For each of `count` cases a sloppy analysis with its verdict, and the same verdict alone: so the base has seen as
    many direct verdicts as analyses, on the same cases and equally often right. Half of the steps are wrong, most of
    them with a number that must be looked up.

    Between them stand exercises in what an analysis needs, since there it is hardly ever told apart from copying what the
    step says: a problem is solved after every second case, with no step to copy from, and numbers are compared.
    """
    kinds = KINDS_OF_ERROR + ("data source", "contradiction")
    with_analysis = (HERE / "prompt.txt").read_text(encoding="utf-8").strip()
    direct = (HERE / "direct_prompt.txt").read_text(encoding="utf-8").strip()
    for i in range(count):
        problem, steps, label = draw(rng, difficulty, i % 2 == 0, kinds)
        index = label if label >= 0 else int(rng.integers(len(steps)))
        analysis, verdict = analyse(rng, problem, steps, index, Sloppiness())
        yield render_chat(render_prompt(with_analysis, problem, steps, index), analysis)
        yield render_chat(render_prompt(direct, problem, steps, index), VERDICT_LINE.format("Yes" if verdict else "No"))
        if i % 2:
            problem = draw_problem(rng, difficulty)
            yield render_chat(f"Solve the problem.\n\nProblem: {problem.text}", worked_solution(problem))
        yield render_chat(*comparisons(rng))


# ---------------------------------------------------------------------------------------------------------------------
# The base model: its tokenizer and configuration

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen2's way of cutting text, words with the space before them; but numbers in pairs of digits, where it has single ones.
CUT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*"
       r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def make_tokenizer():
    """A byte-level BPE tokenizer, lossless on any text, in which each word of this world is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(CUT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text.replace("<|im_end|>", "").replace("<|im_start|>", "")
             for text in pretraining_texts(np.random.default_rng(0), 0.5, 1000)]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1000, min_frequency=2, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def write_base(folder):
    """A Hugging Face folder without weights: a Qwen2 decoder of about 0.9 million parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    pad, end = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False, "model_max_length": 512, "chat_template": CHAT_TEMPLATE})
    write_json(folder / "generation_config.json", {
        "do_sample": True, "temperature": 0.95, "top_p": 0.95, "eos_token_id": [end, pad], "pad_token_id": pad})
    write_json(folder / "config.json", {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 512, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "tie_word_embeddings": True, "initializer_range": 0.06, "attention_dropout": 0.0,
        "use_sliding_window": False, "eos_token_id": end, "pad_token_id": pad, "torch_dtype": "float32"})


# ---------------------------------------------------------------------------------------------------------------------
# Files


def solutions(rng, difficulty, count, split, seen):
    """`count` lines in ProcessBench's format, half of them with an error, on problems not yet `seen`."""
    for i in range(count):
        while True:
            problem, steps, label = draw(rng, difficulty, correct=i % 2 == 0)
            if problem.text not in seen:
                break
        seen.add(problem.text)
        yield {"id": f"{split}-{i}", "generator": "arithmetic", "problem": problem.text,
               "steps": [step.text for step in steps], "final_answer_correct": steps[-1].result == problem.answer,
               "label": label}


def write_lines(path, lines):
    with writing(path) as file:
        file.writelines(map(json_line, lines))
    print(f"wrote {path}")


def main(config):
    print_config(config)
    out = Path(config.out)
    write_base(out / "base")
    seen = set()
    # One stream of random numbers for each file, so that a file does not depend on the size of another.
    rngs = [np.random.default_rng([config.seed, number]) for number in range(4)]
    for rng, split in zip(rngs, ("test", "validation", "train")):
        write_lines(out / f"{split}.jsonl", solutions(rng, config.difficulty, getattr(config, split), split, seen))
    with writing(out / "pretrain.prompt.txt") as file:  # the words around a case travel with the trained model
        file.write((HERE / "prompt.txt").read_text(encoding="utf-8"))
    texts = pretraining_texts(rngs[3], config.difficulty, config.pretrain)
    write_lines(out / "pretrain.jsonl", ({"text": text} for text in texts))


if __name__ == "__main__":
    run((Config, main))
