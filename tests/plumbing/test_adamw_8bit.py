"""AdamW with moments of 8 bits: its codes by hand, its steps against torch's and torchao's."""
import pytest
import torch
from test_training import files_of, sft_rows, write

import train_sft
from plumbing.adamw_8bit import AdamW8bit, block_length, decode, encode, fractions
from plumbing.cli import run
from plumbing.errors import Stopped


def quadratic_step(optimizer: torch.optim.Optimizer, p: torch.Tensor, target: torch.Tensor) -> None:
    p.grad = (p - target).detach()
    optimizer.step()


def groups_of(*parameters: torch.Tensor, weight_decay: float = 0.0) -> list[dict]:
    return [{"params": list(parameters), "weight_decay": weight_decay}]


@pytest.mark.parametrize("signed", [True, False])
def test_the_fractions_are_256_from_a_millionth_to_one(signed):
    """Powers of ten from 1e-6, each cut into more parts; the middle of the least is 0.55e-6."""
    values = fractions(signed)
    assert len(values) == 256 and values.unique().numel() == 256 and bool((values.diff() > 0).all())
    assert values[-1] == 1 and bool((values == 0).any())
    positive = values[values > 0]
    assert positive[0] == pytest.approx(0.55e-6 if signed else 0.325e-6)
    assert len(positive) == (128 if signed else 255)
    assert bool((values < 0).any()) == signed


def test_codes_by_hand():
    """A row of 256 numbers is a block with its own scale; a number becomes the nearest fraction of it."""
    x = torch.zeros(2, 512)
    x[0, 0], x[0, 1], x[0, 300] = 4.0, -2.0, 0.01
    codes, scale = encode(x, block=256, signed=True)
    assert codes.dtype == torch.uint8 and codes.shape == (2, 512)
    assert scale.tolist() == [[4.0, pytest.approx(0.01)], [0.0, 0.0]]
    back = decode(codes, scale, block=256, signed=True)
    values = fractions(signed=True)
    assert back[0, 0] == 4.0
    assert back[0, 300] == pytest.approx(0.01)
    assert back[0, 1] == 4.0 * values[(values + 0.5).abs().argmin()]
    assert back[0, 2:256].abs().sum() == 0 and back[1].abs().sum() == 0


@pytest.mark.parametrize("signed", [True, False])
def test_encoding_again_changes_nothing_and_loses_a_hundredth(signed):
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    if not signed:
        x = x.square()
    codes, scale = encode(x, 256, signed)
    back = decode(codes, scale, 256, signed)
    assert (back - x).abs().max() <= scale.max() * (0.008 if signed else 0.004)


def test_rows_that_blocks_do_not_divide_are_one_block():
    assert [block_length(torch.zeros(3, n)) for n in (64, 256, 576, 3584)] == [64, 256, 576, 256]


def test_a_vector_takes_the_steps_of_adamw():
    start = torch.randn(300)
    target = torch.zeros(300)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    eight = AdamW8bit(groups_of(ours, weight_decay=0.1), lr=0.01, betas=(0.9, 0.99))
    full = torch.optim.AdamW(groups_of(theirs, weight_decay=0.1), lr=0.01, betas=(0.9, 0.99))
    for _ in range(20):
        quadratic_step(eight, ours, target)
        quadratic_step(full, theirs, target)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_matrix_takes_the_first_step_of_adamw_and_later_ones_nearly():
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(6, 512, generator=generator)
    target = torch.randn(6, 512, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    eight = AdamW8bit(groups_of(ours), lr=0.01, betas=(0.9, 0.999))
    full = torch.optim.AdamW(groups_of(theirs), lr=0.01, betas=(0.9, 0.999))
    for step in range(50):
        quadratic_step(eight, ours, target)
        quadratic_step(full, theirs, target)
        if step == 0:
            assert torch.allclose(ours, theirs, atol=1e-6)  # moments are rounded behind the update
    assert (ours - theirs).norm() < 0.05 * (theirs - start).norm()
    assert not torch.equal(ours, theirs)


def test_a_state_takes_two_bytes_a_number_and_the_scales():
    p = torch.nn.Parameter(torch.zeros(4, 512))
    state = AdamW8bit(groups_of(p), lr=0.1, betas=(0.9, 0.99)).new_state(p)
    assert sum(value.nbytes for name, value in state.items() if name != "step") == 2 * (4 * 512 + 4 * 2 * 4)


@pytest.mark.slow
def test_the_steps_are_torchaos():
    """Weights, codes and scales of torchao's AdamW8bit, uncompiled. A number half-way between two fractions may
    go either way: one of 16,384 does here, in the 17th step."""
    optim = pytest.importorskip("torchao.optim", reason="torchao is not installed")
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(16, 512, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    eight = AdamW8bit(groups_of(ours, weight_decay=0.1), lr=0.01, betas=(0.9, 0.99))
    torchao = optim.AdamW8bit(groups_of(theirs, weight_decay=0.1), lr=0.01, betas=(0.9, 0.99))
    with torch.compiler.set_stance("force_eager"):
        for _ in range(15):
            grad = torch.randn(16, 512, generator=generator) * torch.logspace(-2, 0, 512)
            ours.grad, theirs.grad = grad, grad.clone()
            eight.step()
            torchao.step()
    assert torch.allclose(ours, theirs, atol=1e-4)
    for moment in ("exp_avg", "exp_avg_sq"):
        state = torchao.state[theirs][moment]
        assert torch.allclose(eight.state[ours][f"{moment}.scale"].flatten(), state.scale, rtol=1e-5)
        codes = eight.state[ours][f"{moment}.codes"]
        assert (codes.int() - state.codes.int()).abs().max() <= 1
        assert (codes != state.codes).sum() <= 4


def train(tmp_path, tiny_folder, out: str, **changes) -> dict[str, bytes]:
    data = write(tmp_path / "sft.jsonl", sft_rows(24))
    settings = dict(model=str(tiny_folder), train=data, out=str(tmp_path / out), lr=1e-2, batch_size=4,
                    epochs=2, save_every=1, device="cpu", adamw_8bit=True)
    train_sft.main(train_sft.Config(**settings | changes))
    return files_of(tmp_path / out / "model")


@pytest.mark.slow
def test_training_learns_and_a_stopped_run_goes_on_to_the_same_bits(tmp_path, tiny_folder, monkeypatch):
    whole = train(tmp_path, tiny_folder, "whole")
    log = (tmp_path / "whole/metrics.jsonl").read_text()
    check = train_sft.Run.check_finite

    def stop(run, *given):
        if run.step == 5:
            run.stop_signal = 15
        check(run, *given)
    monkeypatch.setattr(train_sft.Run, "check_finite", stop)
    with pytest.raises(Stopped):
        train(tmp_path, tiny_folder, "stopped")
    monkeypatch.setattr(train_sft.Run, "check_finite", check)
    assert train(tmp_path, tiny_folder, "stopped", resume=True) == whole
    assert (tmp_path / "stopped/metrics.jsonl").read_text() == log
    assert train(tmp_path, tiny_folder, "full", adamw_8bit=False) != whole


@pytest.mark.slow
def test_a_run_goes_on_with_the_moments_that_it_was_begun_with(tmp_path, tiny_folder, capsys):
    train(tmp_path, tiny_folder, "out")
    flags = ["--model", str(tiny_folder), "--train", str(tmp_path / "sft.jsonl"), "--out", str(tmp_path / "out"),
             "--lr", "1e-2", "--batch-size", "4", "--epochs", "2", "--save-every", "1", "--resume"]
    with pytest.raises(SystemExit) as exit_:
        run((train_sft.Config, train_sft.main), argv=flags)
    assert exit_.value.code == 2 and "--adamw-8bit" in capsys.readouterr().err
