"""Finding a checkpoint's folder, and saying what to do where there is none."""
import re
from pathlib import Path

from plumbing.errors import BadInput

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # Qwen/Qwen2.5-Math-7B-Instruct


def find_folder(folder: str | Path) -> Path:
    """The checkpoint's folder as a Path. BadInput with the remedy where it is none.

    Nothing is downloaded: what the user names is a folder, or the error says how to get one.
    """
    path = Path(folder)
    if not path.is_dir():
        raise BadInput(f"{folder}: no such checkpoint folder; {remedy(str(folder))}")
    snapshot = newest_snapshot(path)
    if snapshot is not None:
        raise BadInput(f"{folder}: the cache of a download, which may hold several versions; give {snapshot}")
    return path


def remedy(folder: str) -> str:
    """What to do about a folder that is none."""
    if HUB_NAME.fullmatch(folder) and not Path(folder).parent.is_dir():
        own = f"models/{Path(folder).name}"
        download = f"hf download {folder} --local-dir {own}"
        return f"a model of the Hugging Face Hub is downloaded by: {download}; then give {own}"
    return "give a Hugging Face folder (config.json, *.safetensors, tokenizer.json)"


def newest_snapshot(folder: Path) -> Path | None:
    """The folder of files within models--OWNER--NAME, the hub's cache of a model; else None."""
    reference = folder / "refs" / "main"
    if not reference.is_file():
        return None
    snapshot = folder / "snapshots" / reference.read_text(encoding="utf-8", errors="replace").strip()
    return snapshot if snapshot.is_dir() else None
