"""Prompt files: the words around a case, and which of several files they come from."""
from pathlib import Path

from plumbing.errors import BadInput
from plumbing.files import expect, parse_json

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
    return text, str(path)


def travelled_prompt(model: str | Path, adapter: str | Path | None) -> Path:
    """Where the words are that a checkpoint was trained with: beside its adapter, else beside its weights."""
    own = Path(adapter or model) / PROMPT_FILE
    return own if own.is_file() else Path(model) / PROMPT_FILE


def read_template_args(text: str | None) -> dict:
    """The variables of --template-args, a JSON object; none without it."""
    if text is None:
        return {}
    return expect(parse_json(text, "--template-args"), dict, "--template-args")
