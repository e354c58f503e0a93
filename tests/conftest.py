"""Tiny checkpoints, made on the spot: Hugging Face folders of each family with random weights and a small tokenizer.

They are written by hand, from the layout that Hugging Face documents, and not with the code under test. The folders
are shared by the whole session: a test that alters one works on a copy (`shutil.copytree`).
"""
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent
HANG = 1200  # seconds after which a process is taken to hang: none comes near them, on however busy a machine
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts that tests start
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels for a GPU run in Triton's interpreter; read when Triton is imported
torch.set_num_threads(1)  # matrices this small gain nothing from a second thread, and on a busy machine two wait for each other

IM_START, IM_END, END_OF_TEXT = SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN2_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+")
SENTENCES = (
    "Verification: Is the step correct (Yes/No)? Yes", "Verification: Is the step correct (Yes/No)? No",
    "Step 1: Tom has 12 apples and buys 7 more, so he has 12 + 7 = 19 apples. Yes, the sum is right.",
    "Problem: a box holds 24 pens; how many pens do 3 boxes hold? The answer is 24 * 3 = 72. No mistake is there.",
    "Previous Steps: none. Now Step: half of 36 is 18. The calculation is right, and the data come from the problem.",
)
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=4096, rms_norm_eps=1e-6, hidden_act="silu", eos_token_id=1)
LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=32)  # so small that a test's 100 tokens meet all three of its cases
FAMILIES = {  # what each adds to SIZES in its config.json
    "llama": dict(model_type="llama", rope_theta=10000.0),
    "llama3_rope": dict(model_type="llama", rope_theta=500.0, rope_scaling=LLAMA3_ROPE),
    "mistral": dict(model_type="mistral", rope_theta=1000.0, sliding_window=None),
    "qwen2": dict(model_type="qwen2", rope_theta=5000.0, sliding_window=4096, use_sliding_window=False),
    "qwen3": dict(model_type="qwen3", rope_theta=10000.0, head_dim=32),
}


SLOW_FIXTURES = {"smollm2", "serve", "ran", "browser"}  # a real model, server or browser, runs of two ranks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------- scripts as processes

def start(command: list, **environment: str) -> subprocess.Popen:
    """A script as a user runs it: [its path in the project, its flags]."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | environment
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=environment, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_lines(path: Path, lines: int, process: subprocess.Popen) -> None:
    """Until the process has written so many lines; an error where it ends before."""
    deadline = time.monotonic() + HANG
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def kill_and_resume(command: list, path: Path, moments: list[int]) -> str:
    """Run a script with --resume and SIGKILL it when `path` has so many lines, again at the next moment, then let it end -> its output.

    A third of the work must lie behind the last moment, so that on a busy machine too the process is met before it ends.
    """
    command = [*command, "--resume"]
    for lines in moments:
        process = start(command)
        wait_for_lines(path, lines, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was done before"
    process = start(command)
    printed, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0, errors
    return printed


# ---------------------------------------------------------------------------------------------- making checkpoints

def train_tokenizer() -> Tokenizer:
    """A byte-level BPE of 400 tokens that cuts text as Qwen2's does; " Yes" and " No" are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(SENTENCES * 10, trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    for word in (" Yes", " No"):
        assert len(tokenizer.encode(word).ids) == 1, f"{word!r} is no single token of the tests' tokenizer"
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": IM_END, "pad_token": END_OF_TEXT, "chat_template": CHATML})
    ids = [tokenizer.token_to_id(IM_END), tokenizer.token_to_id(END_OF_TEXT)]
    write_json(folder / "generation_config.json", {"eos_token_id": ids, "pad_token_id": ids[1]})


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """The tensors of a Hugging Face checkpoint with this config.json, by name."""
    C, I, H, KV = (config[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"))
    D = config.get("head_dim", C // H)
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], C), "model.norm.weight": (C,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], C)
    layer = {"input_layernorm.weight": (C,), "post_attention_layernorm.weight": (C,),
             "self_attn.q_proj.weight": (H * D, C), "self_attn.k_proj.weight": (KV * D, C),
             "self_attn.v_proj.weight": (KV * D, C), "self_attn.o_proj.weight": (C, H * D),
             "mlp.gate_proj.weight": (I, C), "mlp.up_proj.weight": (I, C), "mlp.down_proj.weight": (C, I)}
    if config["model_type"] == "qwen2":
        layer |= {"self_attn.q_proj.bias": (H * D,), "self_attn.k_proj.bias": (KV * D,), "self_attn.v_proj.bias": (KV * D,)}
    if config["model_type"] == "qwen3":
        layer |= {"self_attn.q_norm.weight": (D,), "self_attn.k_norm.weight": (D,)}
    return shapes | {f"model.layers.{i}.{name}": shape for i in range(config["num_hidden_layers"]) for name, shape in layer.items()}


def random_tensors(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights that keep every activation near 1, so that whatever goes wrong shows in the logits.

    Norm weights and biases are random too: left at 1 and 0 they would hide a mistake.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            tensors[name] = 1 + 0.2 * noise
        else:
            tensors[name] = 0.2 * noise if name.endswith("bias") else noise * shape[1] ** -0.5
    return tensors


def make_config(family: str, tied: bool, **changes) -> dict:
    """The config.json of a tiny model, in the older dialect (rope_theta, rope_scaling)."""
    return SIZES | {"vocab_size": 416, "tie_word_embeddings": tied} | FAMILIES[family] | changes


def write_checkpoint(folder: Path, config: dict, tokenizer: Tokenizer, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    write_tokenizer(folder, tokenizer)
    write_json(folder / "config.json", config)
    save_file(random_tensors(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ---------------------------------------------------------------------------------------------- fixtures

@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    return train_tokenizer()


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory, tiny_tokenizer):
    """make_folder(family, tied) -> a checkpoint folder of that family (a key of FAMILIES), made once. Read only."""
    made = {}

    def make(family: str = "qwen2", tied: bool = True) -> Path:
        if (family, tied) not in made:
            folder = tmp_path_factory.mktemp(f"{family}_{'tied' if tied else 'untied'}") / "checkpoint"
            made[family, tied] = write_checkpoint(folder, make_config(family, tied), tiny_tokenizer, seed=list(FAMILIES).index(family))
        return made[family, tied]
    return make


@pytest.fixture(scope="session")
def tiny_folder(make_folder) -> Path:
    """A Qwen2 checkpoint of 2 layers with a ChatML template: <|im_end|> and <|endoftext|> end an answer. Read only."""
    return make_folder("qwen2", True)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M; skips where it is absent."""
    folder = Path(os.environ.get("RPRM_SMOLLM2", ROOT / "models" / "smollm2"))
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"{folder}: no SmolLM2-135M there; ../shared/tools/make_smollm2.py makes it (or download HuggingFaceTB/"
                    "SmolLM2-135M-Instruct to that folder), or give its place as RPRM_SMOLLM2=FOLDER")
    return folder


@pytest.fixture(scope="session")
def processbench() -> list[dict]:
    """The rows of ProcessBench's GSM8K split; skips where it is absent."""
    path = ROOT / ".." / "shared" / "data" / "processbench" / "gsm8k.json"
    if not path.is_file():
        pytest.skip(f"{path}: no ProcessBench there; put gsm8k.json of Qwen/ProcessBench at that place")
    return json.loads(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------- a real browser for the pages

CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


@pytest.fixture(scope="session")
def browser():
    """A headless chromium with a fresh profile; skips where there is none."""
    if not CHROMIUM.is_file():
        pytest.skip(f"{CHROMIUM}: no browser there; apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-dev.txt")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS, timeout=HANG * 1000)
        yield chromium
        chromium.close()


@contextmanager
def watched_tab(browser, path: Path, width: int = 1280, scheme: str = "light"):
    """The page in a tab. At the end: no error, no message on the console, no request but for the file."""
    complaints = []
    requests = []
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.set_default_timeout(HANG * 1000)
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(path.as_uri())
    yield tab
    tab.close()
    assert complaints == []
    assert requests == [path.as_uri()]


@pytest.fixture
def open_page(browser):
    """open_page(path, width, scheme) -> a tab."""
    with ExitStack() as tabs:
        yield lambda path, **how: tabs.enter_context(watched_tab(browser, path, **how))
