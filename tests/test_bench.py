"""The GPU benchmark in miniature on the CPU: every line of it runs, and its FLOPs are those that PyTorch counts."""
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import gpu
from model import Tree, TreeAttention

ROOT = Path(__file__).parents[1]


def test_the_gpu_benchmark_runs_in_miniature(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "bench/gpu.py", "--shape", "tiny", "--device", "cpu", "--scale", "0.05",
                           "--micro-tokens", "256", "--trees", "2", "--steps", "1", "--prompts", "3", "--k", "2",
                           "--out", tmp_path / "gpu.json"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row["work"] for row in rows] == ["sft", "dpo", "sample"]
    assert all(0 < row[name] < 1 for row in rows for name in row if "utilisation" in name or "share" in name)


def test_its_flops_are_those_that_pytorch_counts():
    config = gpu.Config(shape="tiny", device="cpu", checkpoint_activations=False)
    model = gpu.random_model(config, torch.float32)
    tree = Tree([[1, 2, 3, 4, 5], [1, 2, 3, 9, 8, 7]])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(tree.ids, tree.positions, TreeAttention(tree.end))[:4])
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
    attention = 4 * float((tree.positions + 1).sum()) * 64 * 2
    assert gpu.flops_of_forward(model.config, tree, 4) == products + attention
