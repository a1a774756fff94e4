"""Warmup and schedules of the learning rate, their resumption, and what --allow-changed may change."""

import json
import math
import shutil

import pytest
from safetensors.torch import load_file

import train_leap_align as trainer
from tests.toy_runs import error_line, metrics, run

pytestmark = pytest.mark.usefixtures("no_figures")
EACH = "--lr 1e-3 --iterations 8 --checkpoint-every 1 --checkpoints-total-limit 9".split()
WEIGHTS = "model/weights.safetensors"


def cosine(n):
    return [0.5 + 0.5 * math.cos(math.pi * i / n) for i in range(n)]


RATES = {  # over eight iterations, as fractions of --lr
    "": [1] * 8,
    "--lr-warmup-steps 1": [1] * 8,
    "--lr-warmup-steps 4": [0.25, 0.5, 0.75, 1, 1, 1, 1, 1],
    "--lr-warmup-steps 16": [n / 16 for n in range(1, 9)],
    "--lr-scheduler linear": [1 - n / 8 for n in range(8)],
    "--lr-scheduler linear --lr-warmup-steps 4": [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25],
    "--lr-scheduler cosine": cosine(8),
    "--lr-scheduler cosine --lr-warmup-steps 2": [0.5, 1, *cosine(6)],
}


def rates(out):
    return [row["lr"] for row in metrics(out)]


def changes(out):
    return json.loads((out / "config.json").read_text())["changes"]


def remove_checkpoints(out, after):
    """As if the run had been killed after this iteration."""
    for path in (out / "checkpoint").iterdir():
        if int(path.name) > after:
            shutil.rmtree(path)


@pytest.mark.parametrize("flags", RATES)
def test_the_learning_rate_of_every_iteration_also_of_a_resumed_run_to_the_bit(tmp_path, flags):
    whole, part = tmp_path / "whole", tmp_path / "part"
    rows = run(whole, *EACH, *flags.split())
    assert rates(whole) == pytest.approx([1e-3 * rate for rate in RATES[flags]], rel=1e-12)
    for done in (1, 6) if flags else (5,):
        shutil.copytree(whole, part, dirs_exist_ok=True)
        remove_checkpoints(part, done)
        assert run(part, *EACH, *flags.split(), "--resume") == rows and changes(part) == []
        assert (part / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_a_skipped_iteration_does_not_delay_the_decay(tmp_path, monkeypatch):
    steps, clip = [], trainer.clip_gradient
    monkeypatch.setattr(
        trainer, "clip_gradient", lambda *a: steps.append(1) or (clip(*a) if len(steps) != 3 else math.nan)
    )
    rows = run(tmp_path, *EACH, "--lr-scheduler", "linear")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 0, 0, 0, 0, 0]
    assert rates(tmp_path) == pytest.approx([1e-3 * (1 - n / 8) for n in range(8)], rel=1e-12)


def test_a_change_is_noted_also_where_its_checkpoints_are_lost_and_no_permission_is_needed_again(tmp_path):
    run(tmp_path, *EACH)
    remove_checkpoints(tmp_path, 5)
    run(tmp_path, *EACH, "--lr", "5e-4", "--resume", "--allow-changed", "lr")
    remove_checkpoints(tmp_path, 3)
    rows = run(tmp_path, *EACH, "--lr", "5e-4", "--resume")
    assert changes(tmp_path) == [{"iteration": 3, "lr": [1e-3, 5e-4]}] and rows[3]["lr"] == 5e-4


def test_the_optimizer_uses_the_learning_rate(tmp_path):
    """Adam's first step is the learning rate in size, for every weight whose gradient is not tiny."""
    for iterations in "01":
        flags = ["--iterations", iterations, "--lr", "0.1", "--lr-warmup-steps", "4", "--weight-decay", "0"]
        run(tmp_path / iterations, *flags, "--ema-decay", "0")
    before, after = (load_file(tmp_path / iterations / WEIGHTS) for iterations in "01")
    steps = max((after[name] - before[name]).abs().max().item() for name in before)
    assert steps == pytest.approx(0.1 / 4, rel=1e-3)


ALLOWED = {  # flags of the resumed run, words of its refusal, the changes that it notes, its rates from iteration 4 on
    "--lr 5e-4": ("lr was 0.001, is 0.0005;", {"lr": [1e-3, 5e-4]}, [5e-4 * rate for rate in cosine(8)[3:]]),
    "--lr-scheduler linear --lr-warmup-steps 4": (
        "lr_scheduler was cosine, is linear; lr_warmup_steps was 0, is 4;",
        {"lr_scheduler": ["cosine", "linear"], "lr_warmup_steps": [0, 4]},
        [1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4],
    ),
    "--iterations 6": ("iterations was 8, is 6;", {"iterations": [8, 6]}, [1e-3 * rate for rate in cosine(6)[3:]]),
}


@pytest.mark.parametrize("flags", ALLOWED)
def test_an_allowed_change_is_noted_with_its_iteration_and_any_other_is_refused(tmp_path, flags):
    """Also when the newest checkpoints, made after the change, are lost."""
    start = [*EACH, "--lr-scheduler", "cosine"]
    run(tmp_path, *start)
    remove_checkpoints(tmp_path, 3)
    words, change, expected = ALLOWED[flags]
    resumed, before = [*start, *flags.split(), "--resume"], (tmp_path / "config.json").read_bytes()
    line = error_line(*resumed, "--out", str(tmp_path))
    assert words in line and "--allow-changed" in line and (tmp_path / "config.json").read_bytes() == before
    resumed += ["--allow-changed", *change]
    for lost in (False, True):
        rows = run(tmp_path, *resumed)
        assert [row["lr"] for row in rows[3:]] == pytest.approx(expected, rel=1e-12)
        assert rows == run(tmp_path, *resumed)  # a cluster's next start, which changes nothing
        assert changes(tmp_path) == [{"iteration": 3, **change}]
        remove_checkpoints(tmp_path, 3 if not lost else 5)
    longer = ["--iterations", "12", "--lr-scheduler", "constant", "--lr", "1e-3"]
    allowed = ["--allow-changed", "iterations", "lr_scheduler", "lr", "lr_warmup_steps"]
    run(tmp_path, *resumed, *longer, *allowed)
    assert [row["iteration"] for row in changes(tmp_path)] == [3, 5] and rates(tmp_path)[5:] == [1e-3] * 7
