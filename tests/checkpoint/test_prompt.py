"""Which prompt file is read, and which cannot be."""
import pytest

from checkpoint import read_prompt
from checkpoint.flags import SamplerConfig, ServedConfig
from conftest import ROOT
from plumbing.errors import BadInput
from rprm import Sampling


def test_which_prompt_is_taken(tmp_path):
    """--prompt-file, else the one that travels with the checkpoint, else the project's own."""
    given, travelled, absent = tmp_path / "given", tmp_path / "travelled", tmp_path / "absent"
    given.write_text("given {} é\n", encoding="utf-8")
    travelled.write_text("travelled {}", encoding="utf-8")
    assert read_prompt(str(given), travelled) == ("given {} é\n", str(given))
    assert read_prompt(None, travelled) == ("travelled {}", str(travelled))
    for direct, name in ((False, "verify.txt"), (True, "direct.txt")):
        path = ROOT / "prompts" / name
        for nothing in (None, absent, tmp_path):
            assert read_prompt(None, nothing, direct) == (path.read_text(encoding="utf-8"), str(path))


def test_the_text_is_the_files_own(tmp_path):
    """The two characters backslash and n stay two; a byte-order mark is no text; every line ends alike."""
    path = tmp_path / "prompt.txt"
    path.write_bytes("\ufeff<|im_start|>system\\nHelp.\r\n {} \n\n".encode())
    assert read_prompt(path, None) == ("<|im_start|>system\\nHelp.\n {} \n\n", str(path))


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"absent.txt: no such prompt file"):
        read_prompt(tmp_path / "absent.txt", None)
    with pytest.raises(BadInput, match="no such prompt file"):
        read_prompt(tmp_path, None)
    (tmp_path / "latin.txt").write_bytes("Prüfe {} {} {}".encode("latin-1"))
    with pytest.raises(BadInput, match=r"latin.txt: not UTF-8"):
        read_prompt(tmp_path / "latin.txt", None)
    with pytest.raises(BadInput, match=r"latin.txt: not UTF-8"):
        read_prompt(None, tmp_path / "latin.txt")


def test_the_flags_of_sampling_have_the_papers_defaults():
    """Those of `rprm.Sampling`; --k and --batch-size are the scripts' own."""
    flags, sampling = SamplerConfig(model="m"), Sampling()
    for name in ("temperature", "top_p", "max_new_tokens", "seed"):
        assert getattr(flags, name) == getattr(sampling, name), name
    assert ServedConfig(model="m").batch_size == sampling.batch_size
