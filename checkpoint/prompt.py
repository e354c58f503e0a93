"""Prompt files: the words around a case, and which of several files they come from."""
import re
from pathlib import Path

from checkpoint.tokenizer import ChatTokenizer
from plumbing.errors import BadInput
from plumbing.files import expect, parse_json, writing

PROMPT_FILE = "verification_prompt.txt"  # in a checkpoint: the words that it was trained with travel with it
OWN_PROMPTS = Path(__file__).parents[1] / "prompts"  # the project's own


def read_prompt(prompt_file: str | Path | None, travelled: str | Path | None,
                direct: bool = False) -> tuple[str, str]:
    """(the text of a prompt, the name of its file).

    prompt_file: the one that the user names (--prompt-file); it must be there.
    travelled:   the one that stands beside a checkpoint or data, if there is one.
    direct:      with neither, the project's own prompt asks for a verdict without an analysis.
    """
    if prompt_file is not None:
        path = Path(prompt_file)
    elif travelled is not None and Path(travelled).is_file():
        path = Path(travelled)
    else:
        path = OWN_PROMPTS / ("direct.txt" if direct else "verify.txt")
    try:
        text = path.read_text(encoding="utf-8-sig")  # without the byte-order mark that some editors write
    except (FileNotFoundError, IsADirectoryError):
        raise BadInput(f"{path}: no such prompt file; check the path") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not UTF-8 text; save it as UTF-8") from None
    if prompt_file is None and travelled is not None and path != Path(travelled):
        print(f"prompt: the words of {path}, as there is no {travelled}; "
              "if the model was trained with others, give them as --prompt-file FILE")
    return text, str(path)


def split_prompt(text: str, where: str) -> list[str]:
    """A prompt's text at its fields: [words, field, words, field, words, field, words].

    The fields are {problem}, {previous_steps} and {now_step}, in any order, or three bare {} in this one.
    where: the name of the text's file, for errors.
    """
    pieces = re.split(r"\{(problem|previous_steps|now_step|)\}", text)
    names = pieces[1::2]
    if names == ["", "", ""]:
        names = ["problem", "previous_steps", "now_step"]
        pieces[1::2] = names
    if sorted(names) != ["now_step", "previous_steps", "problem"]:
        raise BadInput(
            f"{where}: the prompt needs {{problem}}, {{previous_steps}} and {{now_step}} once each "
            f"(or three bare {{}}), found {names}; correct it"
        )
    return pieces


def own_prompt(path: str | Path) -> Path:
    """The prompt that a file of samples or examples was made with: NAME.prompt.txt beside NAME.jsonl."""
    return Path(path).with_suffix(".prompt.txt")


def write_prompt(path: str | Path, text: str) -> None:
    """Put the prompt beside the file `path` that is made with it."""
    with writing(own_prompt(path)) as file:
        file.write(text if text.endswith("\n") else text + "\n")


def travelled_prompt(model: str | Path, adapter: str | Path | None) -> Path:
    """Where the words are that a checkpoint was trained with: beside its adapter, else beside its weights."""
    own = Path(adapter or model) / PROMPT_FILE
    return own if own.is_file() else Path(model) / PROMPT_FILE


def travelling_prompt(prompt_file: str | None, train: str | Path, model: str | Path,
                      adapter: str | None) -> str | None:
    """The prompt that is saved with a trained model, to ask it in the words of its training. Says which.

    They are those of --prompt-file; else those beside the training data; else those of the adapter, or the
    model, that it starts from.
    """
    if prompt_file is not None:
        split_prompt(*read_prompt(prompt_file, None))  # refuses one that cannot be used
    for path in (prompt_file, own_prompt(train), travelled_prompt(model, adapter)):
        if path is not None and Path(path).is_file():
            print(f"prompt: the words of {path} go with the trained model")
            return Path(path).read_text(encoding="utf-8")
    print(
        f"prompt: no words go with the trained model, as there is no {own_prompt(train)}: score.py will ask "
        "it in those of prompts/verify.txt; if the examples were made with others, give them as "
        "--prompt-file FILE"
    )
    return None


def tell_conversation(text: str, tokenizer: ChatTokenizer) -> None:
    """Say it, if a prompt is a whole conversation."""
    if tokenizer.has_special_tokens(text):
        print("prompt: has special tokens of its own, so it is the whole conversation: "
              "no chat template is put around it")


def read_template_args(text: str | None) -> dict:
    """The variables of --template-args, a JSON object; none without it."""
    if text is None:
        return {}
    return expect(parse_json(text, "--template-args"), dict, "--template-args")
