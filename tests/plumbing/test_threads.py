"""A small model computes with one thread, unless the user says otherwise."""
from types import SimpleNamespace

import pytest
import torch

from plumbing import threads


@pytest.mark.parametrize("parameters, device, environment, chosen", [
    (900_000, "cpu", {}, [1]),
    (135_000_000, "cpu", {}, []),                       # PyTorch's own choice stays
    (900_000, "cpu", {"OMP_NUM_THREADS": "2"}, []),
    (900_000, "cuda", {}, []),
])
def test_a_small_model_takes_one_thread(monkeypatch, capsys, parameters, device, environment, chosen):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    model = SimpleNamespace(parameters=lambda: [torch.empty(parameters, device="meta")], device=torch.device(device))
    threads.choose_threads(model)
    assert found == chosen
    assert ("threads: 1" in capsys.readouterr().out) == bool(chosen)
