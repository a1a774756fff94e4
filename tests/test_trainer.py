"""The trainer, run through its command line on the toy tasks."""

import csv
import json
import math
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_leap_align as trainer
from leap_align import METHODS, checked
from toy.modes import Modes
from toy.task import ToyOptions

TOYS = ["toy", "digits"]
ROOT = Path(__file__).resolve().parent.parent
SMALL = "--pretrain-steps 300 --reward-steps 300 --evaluation-samples 160 --T 21 --batch-size 16 --iterations 4".split()


def run(out, *flags):
    trainer.main([*SMALL, "--out", str(out), *flags])
    return rows(out)


def rows(out):
    """metrics.csv without the seconds, which differ from run to run."""
    with (out / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v and k != "seconds"} for row in csv.DictReader(file)]


def result(out):
    return json.loads((out / "result.json").read_text())


def assert_same(a, b, rel=1e-4):
    assert len(a) == len(b) > 0
    for one, other in zip(a, b):
        assert one == pytest.approx(other, rel=rel, abs=1e-5)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Pictures take most of so short a run; the reference run, made before this, has them."""
    for name in TOYS:
        monkeypatch.setattr(pkgutil.resolve_name(trainer.TASKS[name]), "draw", lambda self, folder: None)
    monkeypatch.setattr(trainer, "curves", lambda *_: None)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "reference"
    run(out)
    return out


def error(capsys, *flags):
    """The one line that a refused command leaves."""
    with pytest.raises(SystemExit) as stop:
        trainer.main([*SMALL, *flags])
    line = str(stop.value)
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


# What a run leaves


def test_a_run_leaves_what_the_readme_promises(reference):
    names = {p.name for p in reference.iterdir()}
    assert {"config.json", "metrics.csv", "evaluations.csv", "result.json", "checkpoint", "model"} <= names
    assert {"samples.png", "trajectories.png", "curves.png"} <= names
    with (reference / "metrics.csv").open() as file:
        assert next(csv.reader(file)) == ["iteration", *trainer.METRICS]
    outcome = result(reference)
    assert (
        set(outcome["before"]) == set(outcome["after"]) == {"reward", "utility", "alignment", "log_density", "spread"}
    )
    assert outcome["seconds"] > 0
    config = json.loads((reference / "config.json").read_text())
    assert config["T"] == 21 and config["lam"] == 0.0 and config["method"] == "leap_align"


@pytest.mark.parametrize("task", TOYS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_every_task(task, method, tmp_path):
    table = run(tmp_path, "--task", task, "--method", method, "--iterations", "2")
    assert len(table) == 2
    assert all(row["grad_norm"] > 0 for row in table)
    before, after = result(tmp_path)["before"], result(tmp_path)["after"]
    assert before != after


def test_the_same_seed_gives_the_same_run_and_another_does_not(reference, tmp_path):
    assert run(tmp_path / "same") == rows(reference)
    assert run(tmp_path / "other", "--seed", "1") != rows(reference)


# One process, many parts, many processes


@pytest.mark.parametrize("flags", [["--pairs", "sample"], *(["--method", m] for m in METHODS)], ids=" ".join)
def test_accumulated_parts_equal_the_whole_batch(flags, tmp_path):
    assert_same(run(tmp_path / "whole", *flags), run(tmp_path / "parts", *flags, "--accumulate", "4"))


def test_processes_draw_the_rows_of_one_batch(monkeypatch):
    config = trainer.Config(batch_size=12, accumulate=2)
    taken = []
    for rank in range(3):
        worker = trainer.Run.__new__(trainer.Run)
        worker.config, worker.rank, worker.world = config, rank, 3
        for rows_of_part in worker.parts():
            taken += range(12)[rows_of_part]
    assert taken == list(range(12))


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "train_leap_align.py"]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        pytest.param(["--pairs", "sample"], marks=pytest.mark.slow),
        pytest.param(["--method", "draft_lv"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_two_processes_equal_one(flags, tmp_path):
    one = run(tmp_path / "one", *flags)
    command = [*TORCHRUN, *SMALL, *flags, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same(one, rows(tmp_path / "two"))
    assert result(tmp_path / "one")["after"] == pytest.approx(result(tmp_path / "two")["after"], rel=1e-3)
    a, b = (torch.load(tmp_path / n / "model" / "velocity.pt", weights_only=True) for n in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_one_process_goes_on_with_what_two_began(reference, tmp_path):
    command = [*TORCHRUN, *SMALL, "--iterations", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same(run(tmp_path, "--resume"), rows(reference))


def test_processes_refuse_together(reference):
    command = [*TORCHRUN, *SMALL, "--out", str(reference)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.count("holds another run") == 1
    assert "[rank1]" not in done.stderr


# What is logged, clipped, averaged


def test_evaluation_and_model_are_of_the_averaged_weights(tmp_path, monkeypatch):
    seen, step, evaluate = [], trainer.Run.descend, Modes.evaluate

    def descend(self, loss):
        norm = step(self, loss)
        seen.append([p.clone() for p in self.parameters])
        return norm

    def watched(self, folder, iteration):
        self.evaluated = {name: p.clone() for name, p in self.model.state_dict().items()}
        return evaluate(self, folder, iteration)

    monkeypatch.setattr(trainer.Run, "descend", descend)
    monkeypatch.setattr(Modes, "evaluate", watched)
    built, build = [], trainer.build
    monkeypatch.setattr(trainer, "build", lambda *args: built.append(build(*args)) or built[-1])
    run(tmp_path, "--iterations", "2", "--ema", "0.5", "--lr", "0.01")
    task = built[0].task
    start = Modes(ToyOptions(pretrain_steps=300, reward_steps=300), T=21).model.parameters()
    expected = [0.5 * (0.5 * a + 0.5 * b) + 0.5 * c for a, b, c in zip(start, *seen)]
    saved = torch.load(tmp_path / "model" / "velocity.pt", weights_only=True)
    names = [name for name, _ in task.model.named_parameters()]
    for name, value in zip(names, expected):
        torch.testing.assert_close(task.evaluated[name], value)
        torch.testing.assert_close(saved[name], value)
    assert not torch.equal(seen[-1][0], expected[0])


@pytest.mark.parametrize("norm", [0.9, 1.1, 5.0])
def test_a_gradient_is_scaled_to_the_clip_and_never_up(tmp_path, norm):
    config, hyper, options, task = trainer.parse([*SMALL, "--clip", "1.0", "--out", str(tmp_path)])
    run = trainer.build(config, hyper, options, task)
    run.optimizer = torch.optim.SGD(run.parameters, lr=1.0)
    before = [p.detach().clone() for p in run.parameters]
    for p in run.parameters:
        p.grad = torch.zeros_like(p)
    run.parameters[0].grad.view(-1)[0] = norm
    assert run.descend(0.0) == pytest.approx(norm)
    moved = sum((p - old).square().sum() for p, old in zip(run.parameters, before)).sqrt()
    assert moved.item() == pytest.approx(min(norm, 1.0), rel=1e-4)


def test_the_gradient_is_clipped(tmp_path, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def watched(self, *args):
        norms.append(torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm().item())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    table = run(tmp_path, "--clip", "0.25", "--iterations", "2")
    assert norms == pytest.approx([0.25, 0.25], rel=1e-3)
    assert min(row["grad_norm"] for row in table) > 0.25


def test_metrics_by_hand(tmp_path, monkeypatch):
    """A reward of 0, 1, 2, ... a sample, whatever it is; lambda = 3.5 leaves 0..3 of 16 below it."""
    monkeypatch.setattr(Modes, "reward", lambda self, sample, _: sample.sum(1) * 0 + torch.arange(len(sample)))
    (row,) = run(tmp_path, "--lam", "3.5", "--iterations", "1", "--method", "refl")
    assert row["reward"] == pytest.approx(7.5)
    assert row["hinge_active"] == pytest.approx(4 / 16)
    assert row["loss"] == pytest.approx((3.5 + 2.5 + 1.5 + 0.5) / 16)
    assert row["weight"] == 1
    (row,) = run(tmp_path / "leap", "--lam", "3.5", "--iterations", "1", "--tau", "50")
    assert row["weight"] == pytest.approx(1 / 100)
    assert 1 <= row["i_j"] < row["i_k"] <= 21
    assert row["d_j"] >= 0 and row["d_0"] > 0


def test_weights_in_half_precision_are_not_trained(tmp_path, monkeypatch, capsys):
    init = Modes.__init__

    def half(self, *args):
        init(self, *args)
        self.model.bfloat16()

    monkeypatch.setattr(Modes, "__init__", half)
    assert "float32" in error(capsys, "--out", str(tmp_path))


# Resuming


def test_a_resumed_run_equals_an_uninterrupted_one(reference, tmp_path):
    run(tmp_path, "--iterations", "2")
    resumed = run(tmp_path, "--iterations", "4", "--resume")
    assert resumed == rows(reference)
    assert result(tmp_path)["after"] == result(reference)["after"]


def test_a_resumed_run_drops_the_rows_after_its_checkpoint(reference, tmp_path):
    flags = ["--checkpoint-every", "2"]
    run(tmp_path, *flags)
    run(tmp_path / "short", *flags, "--iterations", "2")
    shutil.copytree(tmp_path / "short" / "checkpoint", tmp_path / "checkpoint", dirs_exist_ok=True)
    assert run(tmp_path, *flags, "--resume") == rows(reference)


def checkpoints(out):
    return sorted(folder.name for folder in (out / "checkpoint").iterdir())


def test_the_last_checkpoints_are_kept(tmp_path):
    run(tmp_path, "--checkpoint-every", "1")
    assert checkpoints(tmp_path) == ["000003", "000004"]
    run(tmp_path / "one", "--checkpoint-every", "1", "--keep", "1")
    assert checkpoints(tmp_path / "one") == ["000004"]


@pytest.mark.parametrize("where", ["*.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["cut", "flipped", "lost"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(reference, tmp_path, capsys, where, how):
    run(tmp_path, "--checkpoint-every", "1", "--iterations", "3")
    (file,) = (tmp_path / "checkpoint" / "000003").glob(where)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if how == "flipped" else content[: len(content) // 2])
    if how == "lost":
        file.unlink()
    (tmp_path / "metrics.csv").unlink()
    assert run(tmp_path, "--checkpoint-every", "1", "--resume") == rows(reference)
    assert "000003 is damaged" in capsys.readouterr().out
    assert result(tmp_path)["after"] == result(reference)["after"]


def test_nothing_whole_is_left(tmp_path, capsys):
    run(tmp_path, "--iterations", "1")
    for file in (tmp_path / "checkpoint").rglob("state.json"):
        file.write_text("")
    assert "no whole checkpoint among 1" in error(capsys, "--out", str(tmp_path), "--resume", "--iterations", "1")


@pytest.mark.parametrize("owner, name", [(trainer.dcp, "save"), (trainer, "flush")], ids=["written", "synced"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    reference, tmp_path, monkeypatch, capsys, owner, name
):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    run(tmp_path, "--iterations", "2")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        assert "No space left on device" in error(capsys, "--out", str(tmp_path), "--resume")
    assert checkpoints(tmp_path)[0] == "000002"
    assert run(tmp_path, "--resume") == rows(reference)


def test_a_folder_that_is_removed_is_not_made_again(tmp_path, monkeypatch, capsys):
    step = trainer.Run.step

    def removing(self):
        shutil.rmtree(tmp_path / "run")
        return step(self)

    monkeypatch.setattr(trainer.Run, "step", removing)
    assert "is gone" in error(capsys, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_iteration_saves_and_tells_its_number(reference, tmp_path, monkeypatch, capsys, number):
    step, handler = trainer.Run.step, signal.getsignal(number)

    def signalled(self):
        if self.iteration == 1:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_DFL  # once more, and it leaves at once
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Run, "step", signalled)
        with pytest.raises(SystemExit) as stop:
            run(tmp_path)
    assert stop.value.code == 128 + number and "go on with --resume" in capsys.readouterr().err
    assert checkpoints(tmp_path) == ["000002"] and signal.getsignal(number) == handler
    assert run(tmp_path, "--resume") == rows(reference)


def test_a_run_that_stopped_before_its_first_checkpoint_may_start_over(reference, tmp_path, monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Run, "step", interrupted)
        with pytest.raises(SystemExit, match="interrupted; "):
            run(tmp_path)
    assert "start the run without --resume" in error(capsys, "--out", str(tmp_path), "--resume")
    assert run(tmp_path) == rows(reference)


def test_resuming_refuses_fewer_iterations_than_there_were(reference, capsys):
    line = error(capsys, "--out", str(reference), "--resume", "--iterations", "3")
    assert "iterations=3, but the run has 4" in line


def test_resuming_refuses_other_settings_and_an_empty_folder(reference, tmp_path, capsys):
    line = error(capsys, "--out", str(reference), "--resume", "--lr", "0.5")
    assert "lr was 0.0001, is 0.5" in line
    assert "nothing to resume" in error(capsys, "--out", str(tmp_path), "--resume")


# Pieces by hand


def test_ema_by_hand_and_swapped_back():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    ema = trainer.EMA([p], decay=0.9)
    for value in (2.0, 3.0):
        with torch.no_grad():
            p.fill_(value)
        ema.update()
    expected = 0.9 * (0.9 * 1.0 + 0.1 * 2.0) + 0.1 * 3.0
    with ema.swapped():
        assert p.item() == pytest.approx(expected)
    assert p.item() == 3.0
    with pytest.raises(RuntimeError), ema.swapped():
        raise RuntimeError("in the middle of an evaluation")
    assert p.item() == 3.0


def test_signs_of_reward_hacking_by_hand():
    held_out = {"judge": 0.1, "distance": -0.5}
    rows = [
        {"iteration": 0, "reward": 0.0, "judge": 0.5, "distance": 2.0},
        {"iteration": 1, "reward": 1.0, "judge": 0.9, "distance": 2.4},
        {"iteration": 2, "reward": 2.0, "judge": 0.7, "distance": 2.6},
    ]
    assert trainer.hacking_signs(rows[:2], held_out) == {}
    signs = trainer.hacking_signs(rows, held_out)
    assert set(signs) == {"judge", "distance"}
    assert "iteration 1 -> 2" in signs["judge"] and "0.9 -> 0.7" in signs["judge"]
    assert "iteration 0 -> 2" in signs["distance"]
    # A judge that falls together with the reward is a failure, but not hacking.
    assert trainer.hacking_signs([rows[1], {**rows[2], "reward": 0.5}], held_out) == {}


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda x: x, r"shape \(4, 2\).*\(B,\) = \(4,\)"),
        (lambda x: x.sum(), r"shape \(\).*\(4,\)"),
        (lambda x: x.sum(1).detach(), "does not require grad"),
        (lambda x: x.sum(1) * torch.tensor([1, math.nan, 1, math.inf]), r"not finite.*\[1, 3\] of 4"),
    ],
)
def test_a_reward_that_cannot_train_is_refused(reward, words):
    x_0 = torch.ones(4, 2, requires_grad=True)
    with pytest.raises(ValueError, match=words) as caught:
        checked(reward(x_0), x_0)
    assert "\n" not in str(caught.value)


BROKEN = {
    "gradient": lambda x: x.sum(1) + (0 * x.sum(1)).sqrt(),  # finite, but the gradient of sqrt at 0 is not
    "nan": lambda x: x.sum(1) * math.nan,
    "loss": lambda x: x.sum(1) - math.inf,  # whose gradient is finite
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_step_is_left_out(kind, tmp_path, monkeypatch, capsys):
    """As if the iteration had not been: the weights, their average and the optimizer's state stay."""
    good, descend, kept = Modes.reward, trainer.Run.descend, []

    def reward(self, sample, condition):
        return BROKEN[kind](sample) if len(kept) == 2 else good(self, sample, condition)

    def watched(self, loss):
        before = {name: value.clone() for name, value in self.tensors().items()}
        norm = descend(self, loss)
        kept.append(all(torch.equal(value, before[name]) for name, value in self.tensors().items()))
        return norm

    monkeypatch.setattr(Modes, "reward", reward)
    monkeypatch.setattr(trainer.Run, "descend", watched)
    table = run(tmp_path)
    assert kept == [False, False, True, False] and [row["skipped"] for row in table] == [0, 0, 1, 0]
    told = capsys.readouterr().out
    assert "iteration 3: loss" in told and "left out" in told
    assert ("encode" in told or "(0)" not in told) == (kind != "loss")


def test_too_many_broken_steps_stop_the_run_and_leave_the_checkpoint(reference, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(Modes, "reward", lambda self, sample, condition: BROKEN["nan"](sample))
        patch.setattr(Modes, "evaluate", lambda self, folder, iteration: {"reward": 0.0, **self.held_out})
        assert "3 steps in a row left out" in error(capsys, "--out", str(tmp_path / "new"), "--skips", "3")
    run(tmp_path, "--iterations", "2")
    with monkeypatch.context() as patch:
        patch.setattr(Modes, "reward", lambda self, sample, condition: BROKEN["nan"](sample))
        assert "2 steps in a row" in error(capsys, "--out", str(tmp_path), "--resume", "--skips", "2")
    assert run(tmp_path, "--resume") == rows(reference)


# Bad input


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--task", "video"], "unknown task 'video': choose from toy, digits"),
        (["--method", "ppo"], "unknown method 'ppo': choose from leap_align"),
        (["--low", "9", "--high", "22"], "low=9, high=22"),
        (["--method", "drtune", "--m", "12"], "m=12 must be at most"),
        (["--method", "refl", "--m", "22"], "m=22 must be at most T=21"),
        (["--batch-size", "10", "--accumulate", "4"], "batch_size=10 must be a multiple of"),
        (["--iterations", "-1"], "iterations=-1"),
        (["--checkpoint-every", "0"], "checkpoint_every=0"),
        (["--lr", "-1"], "lr=-1.0"),
        (["--T", "1", "--method", "refl"], "T=1 must be at least 2"),
        (["--weight-decay", "-1"], "weight_decay=-1"),
        (["--seed", "-1"], "seed=-1"),
        (["--shift", "0"], "shift=0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_one_line(flags, words, tmp_path, capsys):
    assert re.search(words, error(capsys, "--out", str(tmp_path / "run"), *flags))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--alpha", "1.5"], "alpha=1.5 must lie in [0, 1]"),
        (["--alpha", "much"], "Error parsing --alpha: could not convert"),
        (["--tau", "0"], "tau=0.0 must be positive"),
        (["--evaluation-samples", "3"], "evaluation_samples=3 must be at least"),
        (["--alpah", "0"], "--alpah"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_command_line_refuses_is_said_without_a_traceback(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        trainer.main([*flags, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert words in text and "Traceback" not in text
    assert not (tmp_path / "run").exists()


def test_an_occupied_folder_is_refused(reference, capsys):
    kept = (reference / "metrics.csv").read_bytes()
    assert "holds another run" in error(capsys, "--out", str(reference))
    assert (reference / "metrics.csv").read_bytes() == kept


def test_a_folder_that_cannot_be_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert "cannot write to" in error(capsys, "--out", str(tmp_path / "file"))


@pytest.mark.parametrize("task", TOYS)
def test_help_names_every_flag_with_its_meaning(task, capsys):
    with pytest.raises(SystemExit) as stop:
        trainer.main(["--task", task, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in (
        "--task",
        "--method",
        "--iterations",
        "--batch-size",
        "--seed",
        "--out",
        "--resume",
        "--alpha",
        "--lam",
    ):
        assert flag in text
    assert "Discount of the nested gradient" in text
    assert all(name in text for name in [*METHODS, *trainer.TASKS])


# What the README shows (slow)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "judges"), [("toy", ["utility", "alignment"]), ("digits", ["utility", "svm", "forest"])]
)
def test_the_main_job_raises_the_held_out_evaluators(task, judges, tmp_path):
    trainer.main(["--task", task, "--out", str(tmp_path)])
    before, after = result(tmp_path)["before"], result(tmp_path)["after"]
    for judge in judges:
        assert after[judge] > before[judge]
    assert after[judges[1]] > 0.95


# What can happen to a run; `python -m tests.faults` does much more of it


@pytest.mark.skipif(not hasattr(os, "fork"), reason="faults.py forks")
def test_nothing_is_lost_whatever_happens():
    done = subprocess.run([sys.executable, "-m", "tests.faults", "--short"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("|    0 |") == 4
