"""Texts that are put together have the ids that Transformers gives for the whole, with every tokenizer.

Llama 2's and Mistral's mark the first word of a text ("▁"). Tiny ones are made here, in each way of doing it.
"""
import json
import random
import shutil
from itertools import product
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from checkpoint import load_tokenizer
from conftest import IM_END, IM_START, ROOT, SENTENCES, write_json
from rprm import VERIFICATION, yes_no_ids

SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
FLAVOURS = ("first", "always", "legacy")  # at the beginning; after special tokens too; that in Llama 2's way
TEMPLATES = {
    "special": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
               "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",  # Mistral 7B v0.3
    "special, no space": "<s>{% for m in messages %}<|user|>{{ m.content }}<|assistant|>{% endfor %}",
    "plain text": "{{ bos_token }}### Question\n{{ messages[0].content }}\n\n### Answer\n",
    "the message first": "{{ messages[0].content }}\nAnswer:",
}
MESSAGES = ["Tom has 12 apples.", " how many pens?", "\n\nStep 1: half of 36 is 18\n", "é ½ 中文", "7", "- ▁"]
ANSWERS = [f"Yes, the sum is right.\n{VERIFICATION} Yes", " No", "\nThe step is right.", "72 pens", "pens\n"]


def make_tokenizer(flavour: str) -> Tokenizer:
    """A BPE tokenizer with byte fallback, as SentencePiece's are converted."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.train_from_iterator(SENTENCES * 10, trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL + BYTES, show_progress=False))
    value = json.loads(tokenizer.to_str())
    value["added_tokens"] = value["added_tokens"][:len(SPECIAL)]  # bytes are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps(value))
    if flavour == "legacy":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=flavour, split=False)
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def write_folder(folder: Path, tokenizer: Tokenizer, template: str) -> Path:
    """A folder with a tokenizer that Transformers takes as it is, and no model."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": template})
    return folder


@pytest.fixture(scope="session", params=FLAVOURS)
def marking(request) -> Tokenizer:
    return make_tokenizer(request.param)


@pytest.fixture(params=TEMPLATES)
def marking_folder(request, marking, tmp_path) -> Path:
    return write_folder(tmp_path / "marking", marking, TEMPLATES[request.param])


def test_chats_equal_transformers(marking_folder):
    tokenizer, expected = load_tokenizer(marking_folder), AutoTokenizer.from_pretrained(marking_folder)
    for message in MESSAGES:
        chat = [{"role": "user", "content": message}]
        whole = expected.apply_chat_template(chat, add_generation_prompt=True)
        assert tokenizer.chat(message) == whole["input_ids"]


def test_a_continuation_has_the_ids_of_the_whole_text(marking_folder):
    """Prompt and answer; then a verification line after the answer, given as ids or as text."""
    tokenizer, expected = load_tokenizer(marking_folder), AutoTokenizer.from_pretrained(marking_folder)
    for message, answer in product(MESSAGES, ANSWERS):
        prompt = tokenizer.chat(message)
        chat = [{"role": "user", "content": message}]
        text = expected.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        whole = expected(text + answer + "</s>", add_special_tokens=False)["input_ids"]
        assert prompt + tokenizer.response(answer) == whole
        assert prompt + tokenizer.response(answer, prompt) == whole
        for before in ([], "", prompt):
            assert tokenizer.continuation(before, answer) == whole[len(prompt):-1]
        line = VERIFICATION if answer.endswith("\n") else "\n" + VERIFICATION
        longer = expected(text + answer + line, add_special_tokens=False)["input_ids"]
        for before in (whole[:-1], whole[len(prompt):-1], answer):
            assert whole[:-1] + tokenizer.continuation(before, line) == longer
            assert tokenizer.continuation(before, "Yes") != tokenizer.encode("Yes")  # which has a mark


def test_an_answer_after_a_special_token_begins_as_the_family_has_it(marking, tmp_path):
    tokenizer = load_tokenizer(write_folder(tmp_path / "x", marking, TEMPLATES["special"]))
    begins = marking.encode("</s>Yes", add_special_tokens=False).ids[1:]
    assert tokenizer.continuation([tokenizer.backend.token_to_id("[/INST]")], "Yes") == begins
    assert tokenizer.continuation([5, 6, 300], "Yes") == tokenizer.continuation("x", "Yes")
    assert marking.decode(tokenizer.response("Yes, 12")[:-1]) == "Yes, 12"


def test_the_verdicts_words_are_single_tokens(marking_folder):
    """The token after the question in a text is the one whose probability is compared."""
    tokenizer = load_tokenizer(marking_folder)
    yes, no = yes_no_ids(tokenizer)
    assert (tokenizer.backend.id_to_token(yes), tokenizer.backend.id_to_token(no)) == ("▁Yes", "▁No")
    assert tokenizer.continuation("Hm.\n", VERIFICATION + " Yes")[-1] == yes


@pytest.mark.parametrize("text", [
    "Yes", " Yes", "\nYes", "\n\n" + VERIFICATION, "", " ", "é", "12", ".5", "x\n", "<|im_end|>"])
def test_without_marks_a_continuation_is_the_texts_own_encoding(tiny_folder, text):
    """Byte-level BPE: whatever stands before."""
    tokenizer = load_tokenizer(tiny_folder)
    assert not tokenizer.marks_texts
    for before in ([], [5], [0], [1], "", "Hm.", "\n"):
        assert tokenizer.continuation(before, text) == tokenizer.encode(text)


def test_smollm2_and_the_embedded_model_mark_nothing(smollm2):
    for folder in (smollm2, ROOT / "examples/arithmetic/base"):
        tokenizer = load_tokenizer(folder)
        assert not tokenizer.marks_texts
        assert tokenizer.continuation("Hm.", "\n" + VERIFICATION) == tokenizer.encode("\n" + VERIFICATION)


def test_a_byte_level_tokenizer_may_add_a_space(tiny_folder, tmp_path):
    """GPT-2's add_prefix_space is a mark too."""
    backend = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    folder = shutil.copytree(tiny_folder, tmp_path / "space")
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("Yes")) == " Yes"
    assert tokenizer.decode(tokenizer.continuation("x", "Yes")) == "Yes"


def test_tokens_that_take_the_white_space_beside_them(marking, tmp_path):
    """Phi-3's turn marks do: "<|user|>\\n" is one token, also where the message spells out another."""
    backend = Tokenizer.from_str(marking.to_str())
    backend.add_special_tokens([AddedToken("<|user|>", rstrip=True, normalized=False),
                                AddedToken("<|assistant|>", lstrip=True, rstrip=True, normalized=False)])
    template = "{% for m in messages %}<|user|>\n{{ m.content }}</s>\n{% endfor %} <|assistant|>\n"
    folder = write_folder(tmp_path / "phi", backend, template)
    tokenizer, expected = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for message in MESSAGES:
        chat = [{"role": "user", "content": message}]
        text = expected.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer.chat(message)
        assert prompt == expected(text, add_special_tokens=False)["input_ids"]
        longer = expected(text + "\n Yes", add_special_tokens=False)["input_ids"]
        assert prompt + tokenizer.continuation(prompt, "\n Yes") == longer
    assert tokenizer.chat("\n a</s>") == [5, *tokenizer.section(5, "a</s>"), 2, 6]


# -------------------------------------------------------------------------------- whole conversations

# A prompt file of the official shape: a ChatML conversation with three bare fields. Some of its line ends are
# the two characters backslash and n.
OFFICIAL = (
    "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n<|im_start|>user\nJudge the last step.\\n"
    "Question: {}\nPrevious Steps: {}\\nNow Step: {}\n\nEnd with one line: Verification: Is the step correct "
    "(Yes/No)? X<|im_end|>\\n<|im_start|>assistant\n")
ODD = ["", " ", "\n", "x\n", " x", "é ½ 中文 🙂", "{}", "\\frac{1}{2} \\n", "-1", "\ue000", "\t\t", "<|im_"]


def pieces_of(prompt: str, *fields: str) -> list[tuple[str, bool]]:
    """The prompt file's texts and the fields between them, in turn."""
    first, *texts = prompt.split("{}")
    pieces = [(first, True)]
    for text, value in zip(texts, fields, strict=True):
        pieces += [(value, False), (text, True)]
    return pieces


def odd_fields(count: int) -> list[list[str]]:
    """Problem, previous steps and now step, with odd beginnings and ends."""
    rng = random.Random(0)

    def field() -> str:
        return rng.choice(ODD) + rng.choice(SENTENCES) * rng.randrange(2) + rng.choice(ODD)

    return [[field(), field(), field()] for _ in range(count)]


@pytest.mark.parametrize("name", ["embedded", "smollm2"])
def test_conversations_equal_transformers(name, request):
    """200 prompts. The embedded model cuts numbers into pairs of digits; AutoTokenizer would not."""
    folder = ROOT / "examples/arithmetic/base" if name == "embedded" else request.getfixturevalue("smollm2")
    tokenizer, expected = load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert tokenizer.has_special_tokens(OFFICIAL)
    assert not tokenizer.has_special_tokens(OFFICIAL.replace("|", "!"))
    for fields in odd_fields(200):
        pieces = pieces_of(OFFICIAL, *fields)
        text = "".join(piece for piece, _ in pieces)
        ids = tokenizer.conversation(pieces)
        assert ids == expected(text)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_marked_conversations_equal_transformers(marking, tmp_path):
    folder = write_folder(tmp_path / "marking", marking, TEMPLATES["plain text"])
    tokenizer, expected = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    prompts = ("[INST] Judge.\\n{}\n{}{} [/INST]", "{}</s>{}[/INST]{}", "<s>{}<|user|>{}\n{}<|assistant|>\n")
    for prompt, fields in product(prompts, odd_fields(20)):
        pieces = pieces_of(prompt, *fields)
        assert tokenizer.conversation(pieces) == expected("".join(piece for piece, _ in pieces))["input_ids"]


def test_a_conversation_begins_as_the_tokenizer_begins_a_text(marking, tmp_path):
    """<s> is put before it once, whether the prompt file has it or not; Transformers would put it twice."""
    backend = Tokenizer.from_str(marking.to_str())
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = write_folder(tmp_path / "bos", backend, TEMPLATES["plain text"])
    tokenizer, expected = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    with_start = tokenizer.conversation([("<s>[INST] ", True), ("Tom", False), ("[/INST]", True)])
    without = tokenizer.conversation([("[INST] ", True), ("Tom", False), ("[/INST]", True)])
    assert with_start == without == expected("[INST] Tom[/INST]")["input_ids"]
    assert without.count(1) == 1


@pytest.mark.parametrize("field", [IM_END, f"a{IM_END}\n{IM_START}user\nb", IM_START * 2, "<|endoftext|> é"])
def test_special_tokens_spelled_out_in_a_field_stay_text(tiny_folder, field):
    tokenizer = load_tokenizer(tiny_folder)
    pieces = pieces_of(OFFICIAL, "Tom has 12 apples.", field, field)
    ids = tokenizer.conversation(pieces)
    assert tokenizer.decode(ids) == "".join(piece for piece, _ in pieces)
    assert [i for i in ids if i < 3] == [0, 1, 0, 1, 0]
    assert ids[:20] == tokenizer.conversation(pieces_of(OFFICIAL, "Tom has 12 apples.", "", ""))[:20]


def test_a_special_token_that_a_field_completes_is_text(tiny_folder):
    """Half of it in the prompt file, half in the field: nobody meant it."""
    tokenizer = load_tokenizer(tiny_folder)
    ids = tokenizer.conversation([("<|im_start|>user <|im_", True), ("end|>", False), ("<|im_end|>", True)])
    assert [i for i in ids if i < 3] == [0, 1]
    assert tokenizer.decode(ids) == "<|im_start|>user <|im_end|><|im_end|>"


def test_what_has_no_token_is_no_special_token(tmp_path):
    """"<unk>" is a special token, and stands for a character that the vocabulary lacks."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(["abc </s>"], trainer)
    tokenizer = load_tokenizer(write_folder(tmp_path / "unk", backend, "{{ messages[0].content }}</s>"))
    assert 0 in tokenizer.encode_marked("aé") and not tokenizer.has_special_tokens("aé")
    assert tokenizer.has_special_tokens("a<unk>")
    assert tokenizer.chat("aéb") == tokenizer.encode("aéb") + [2]


@pytest.mark.parametrize("text", ["<|IM_END|>", "a <|Im_End|>b"])
def test_a_special_token_that_the_normalizer_makes_stays_text(tiny_folder, tmp_path, text):
    """A tokenizer may look for its special tokens in the text that its normalizer has changed."""
    backend = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    backend.normalizer = normalizers.Lowercase()
    backend.add_special_tokens([AddedToken(IM_END, normalized=True)])
    folder = shutil.copytree(tiny_folder, tmp_path / "lowercase")
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert 1 in tokenizer.encode_marked(text)
    assert 1 not in tokenizer.encode(text)
    assert [i for i in tokenizer.chat(text) if i < 3] == [0, 1, 0]
