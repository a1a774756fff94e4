"""The trainer, run through its command line on the toy tasks."""

import csv
import json
import math
import re
import shlex
import subprocess
import time
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import beyond
import full_scale.__main__
import train_leap_align as trainer
from leap_align import BadInput, sample_pair
from runtime import command_line, task
from runtime.checkpoint import training_tensors
from runtime.report import next_command
from tests import toy_runs
from tests.toy_runs import SMALL, before_every_step, error_line, in_group, metrics, result, run, train_rank
from toy.laboratory.__main__ import EXPERIMENTS
from toy.modes import Modes
from toy.task import ToyOptions

pytestmark = pytest.mark.usefixtures("no_figures")
LEASH = ["--beta", "3"]
WEIGHTS = "model/weights.safetensors"


def test_a_run_leaves_what_the_readme_promises(reference):
    files = (
        "config.json metrics.csv evaluations.csv result.json checkpoint model samples.png trajectories.png curves.png"
    )
    assert set(files.split()) <= {p.name for p in reference.iterdir()}
    with (reference / "metrics.csv").open() as file:
        assert next(csv.reader(file)) == ["iteration", *trainer.METRICS]
    evaluators = {"reward", "utility", "alignment", "log_density", "spread"}
    assert set(result(reference)["before"]) == set(result(reference)["after"]) == evaluators
    assert result(reference)["seconds"] > 0
    config = json.loads((reference / "config.json").read_text())
    assert config["T"] == 21 and config["lam"] == 0.0 and config["method"] == "leap_align"


def test_a_run_prints_at_most_a_line_a_second_and_once_that_its_gradient_is_zero(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Modes, "reward", lambda self, sample, condition: 0 * sample.sum(1) - 1)
    start = time.perf_counter()
    run(tmp_path, "--iterations", "100")
    printed = capsys.readouterr()
    lines = printed.err.count("\rleap_align:") + printed.err.startswith("leap_align:")
    assert 2 <= lines <= time.perf_counter() - start + 5  # at the start and the end, and one more after each message
    assert "iteration 1: the gradient is exactly zero" in printed.out and printed.out.count("exactly zero") == 1


def test_a_run_says_what_it_will_do_and_what_to_look_at(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer.report, "draw_curves", lambda folder, *_: (folder / "curves.png").touch())
    monkeypatch.setattr(Modes, "draw_figures", lambda _, folder: (folder / "a.png").touch())
    run(tmp_path, "--method", "refl")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "toy is trained to lower weight * max(0, 0 - reward): 4 iterations of 16 samples, 21 steps each, lr 0.0001.",
        "ReFL: sample without gradient, stop early at t_min, leap to the image with gradient.",
        f"Training never sees these evaluators: utility, alignment, log_density, spread. The folder is {tmp_path}.",
        "Processes: 1; device: cpu; precision: float32.",
    ]
    assert lines[-2:] == [
        f"look at {tmp_path}/a.png, {tmp_path}/curves.png",
        "next: python train_leap_align.py --task digits  # toy/tour.ipynb draws what this run did",
    ]
    run(tmp_path, "--method", "refl", "--iterations", "5", "--resume")
    assert ": 5 iterations of 16 samples, 21 steps each, lr 0.0001, from iteration 4 of 5.\n" in capsys.readouterr().out
    monkeypatch.setattr(trainer, "build_task", Mock(side_effect=BadInput("no task")))
    monkeypatch.setattr(Modes, "held_out", {})
    error_line("--out", str(tmp_path / "new"))
    assert f"\nTraining never sees these evaluators: none. The folder is {tmp_path}/new.\n" in capsys.readouterr().out


LOSSES = {
    "--beta 0": "weight * max(0, 0 - reward)",
    "--lam 0.55": "weight * max(0, 0.55 - reward)",
    "--lam None": "-weight * reward",
    "--beta 3": "weight * max(0, 0 - reward) + 3 * leash",
    "--lam None --beta 0.5": "-weight * reward + 0.5 * leash",
}


@pytest.mark.parametrize("flags", LOSSES)
def test_the_announced_loss_is_the_one_of_the_log(flags, tmp_path, capsys):
    """One sample an iteration: with the columns of its row put in, the formula gives the column `loss`."""
    row = run(tmp_path, "--batch-size", "1", "--iterations", "2", "--lr", "0.1", *flags.split())[-1]
    announced = capsys.readouterr().out.split(" is trained to lower ")[1].split(": 2 iterations")[0]
    assert announced == LOSSES[flags]
    assert eval(announced, {"max": max}, row) == pytest.approx(row["loss"], rel=1e-5)
    assert row.get("leash", 1) > 1e-3 * abs(row["loss"])


def test_the_next_commands_parse_and_never_suggest_the_same_run_again(capsys):
    found, command = [], "python train_leap_align.py"
    while "train_leap_align.py" in command:
        assert command not in found
        found.append(command)
        flags = trainer.parse(shlex.split(command, comments=True)[2:])
        command_line.check(flags.run, flags.method, trainer.METHODS[flags.run.method], world_size=1)
        command = next_command(trainer.task_class(flags.run.task), flags.method.lam, flags.run.beta)
    assert [re.findall(r"--lam|--beta", c) for c in found] == [[], [], ["--lam"], ["--lam", "--beta"]]
    assert command.split()[:3] == ["python", "-m", "toy.laboratory"] and command.split()[3] in EXPERIMENTS
    assert all("toy/tour.ipynb" in suggestion for suggestion in (found[1], command))
    assert next_command(task.Task, None, 3.0) == "python train_leap_align.py --help"
    pytest.importorskip("diffusers")
    for name in ("flux", "sd3", "klein"):
        command = shlex.split(next_command(trainer.task_class(name), None, 0), comments=True)
        assert command[:3] == ["python", "-m", "full_scale"]
        with pytest.raises(SystemExit) as stop:
            full_scale.__main__.main(command[3:])
        assert not stop.value.code and "--prompts" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["leap_align", "stratified"])
def test_a_method_trains_on_few_steps_of_the_second_order_solver(method, tmp_path):
    """Evaluations keep their own 25 Euler steps, or evaluation_T: before training they are those of any other run."""
    flags = ["--method", method, "--iterations", "1", "--m", "4"]
    few = run(tmp_path / "few", *flags, "--T", "8", "--solver", "ab2")
    assert few != run(tmp_path / "many", *flags) and few[0]["grad_norm"] > 0
    run(tmp_path / "shorter", "--evaluation-T", "4", "--iterations", "0")
    before = [result(tmp_path / name)["before"] for name in ("few", "many", "shorter")]
    assert before[0] == before[1] != before[2]
    with np.load(tmp_path / "shorter" / "samples" / "000000.npz") as saved:
        assert len(saved["states"]) == 5


def test_a_methods_own_defaults_stand_between_the_tasks_and_the_flags():
    hyper = trainer.parse(["--method", "lagrange", "--rho", "0.7"]).method
    assert (hyper.alpha, hyper.tau, hyper.rho, hyper.node_discount) == (0.1, 0.2, 0.7, 0.25)
    assert hyper.lam == 0.0  # the task's
    assert trainer.parse([]).method == beyond.Hyper(lam=0.0)
    assert trainer.parse(["--method=stratified"]).method.alpha == 1.0


def test_help_names_every_flag_with_its_meaning_and_the_defaults_of_the_method(capsys):
    with pytest.raises(SystemExit) as stop:
        trainer.main(["--method", "bridge", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    flags = "--task --method --iterations --batch-size --seed --out --resume --alpha --lam --beta".split()
    assert stop.value.code == 0 and "(K; drtune, sparse, bridge), or leaps (stratified). (default: 5)" in text
    assert all(name in text for name in [*flags, *trainer.METHODS, *trainer.TASKS])


def test_the_same_seed_gives_the_same_run_and_another_does_not(reference, tmp_path):
    """One generator makes all draws: prompts, noise and timesteps of an iteration, then those of the next one."""
    assert run(tmp_path / "same") == metrics(reference)
    assert run(tmp_path / "other", "--seed", "1") != metrics(reference)
    generator = torch.Generator().manual_seed(0)
    for row in metrics(reference):
        torch.randint(8, (16,), generator=generator), torch.randn(16, 2, generator=generator)
        assert (row["i_k"], row["i_j"]) == sample_pair(21, generator)


def assert_same(a, b):
    for one, other in zip(a, b, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


METHOD_FLAGS = {name: ["--method", name] for name in trainer.METHODS}
OTHER_FLAGS = [LEASH, [*LEASH, "--method", "draft_lv"], ["--task", "digits"]]


@pytest.mark.parametrize("flags", [*METHOD_FLAGS.values(), *OTHER_FLAGS], ids=" ".join)
def test_microbatches_equal_the_whole_batch(flags, tmp_path):
    microbatches = run(tmp_path / "microbatches", *flags, "--gradient-accumulation-steps", "4")
    assert_same(run(tmp_path / "whole", *flags), microbatches)
    assert len(microbatches) == 4 and all(row["grad_norm"] > 0 for row in microbatches)


def test_a_batch_that_all_ranks_cannot_share_is_refused():
    with pytest.raises(BadInput, match="batch_size=16 must be a multiple of 3 processes"):
        command_line.check(trainer.Config(batch_size=16), beyond.Hyper(), trainer.METHODS["leap_align"], world_size=3)


SLOW = [METHOD_FLAGS[name] for name in ("leap_align", "leap_align_per_sample", "draft_lv", "stratified")]


@pytest.mark.parametrize("flags", [LEASH, *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW)], ids=" ".join)
def test_two_processes_equal_one(flags, tmp_path):
    one = run(tmp_path / "one", *flags)
    in_group(train_rank, [*SMALL, *flags, "--out", tmp_path / "two"])
    assert_same(one, metrics(tmp_path / "two"))
    assert result(tmp_path / "one")["after"] == pytest.approx(result(tmp_path / "two")["after"], rel=1e-3)
    weights = [load_file(tmp_path / name / WEIGHTS) for name in ("one", "two")]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_one_process_resumes_a_run_of_two(reference, tmp_path):
    flags = ["--out", tmp_path, "--iterations", 2, "--checkpoint-every", 1, "--async-checkpoints"]
    in_group(train_rank, [*SMALL, *flags])
    assert_same(run(tmp_path, "--resume"), metrics(reference))


@pytest.mark.slow
def test_a_refusal_of_rank_0_is_printed_once(reference):
    command = [*toy_runs.TORCHRUN, *SMALL, "--out", reference]
    done = subprocess.run(command, cwd=toy_runs.ROOT, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stderr.splitlines() if "holds another run" in line]
    assert done.returncode == 1
    assert len(lines) == 2 and lines[0].startswith("error: ")  # ours, and the one in torchrun's table
    assert "[rank1]" not in done.stderr


def test_evaluation_and_model_are_of_the_averaged_weights(tmp_path, monkeypatch):
    live, evaluated = [], {}

    def recorded_step(self, loss, step=trainer.Trainer.optimizer_step):
        norm = step(self, loss)
        live.append({name: p.clone() for name, p in self.task.model.named_parameters()})
        return norm

    def recorded_evaluate(self, *where, evaluate=Modes.evaluate):
        evaluated.update({name: p.clone() for name, p in self.model.state_dict().items()})
        return evaluate(self, *where)

    monkeypatch.setattr(trainer.Trainer, "optimizer_step", recorded_step)
    monkeypatch.setattr(Modes, "evaluate", recorded_evaluate)
    run(tmp_path, "--iterations", "2", "--ema-decay", "0.5", "--lr", "0.01")
    start, (one, two) = Modes(ToyOptions(pretrain_steps=300, reward_steps=300), T=21).model.state_dict(), live
    expected = {name: 2 / 11 * (0.1 * start[name] + 0.9 * one[name]) + 9 / 11 * two[name] for name in start}
    for averaged in (evaluated, load_file(tmp_path / WEIGHTS)):
        torch.testing.assert_close(averaged, expected)
    assert all(not torch.equal(two[name], expected[name]) for name in start)


@pytest.mark.parametrize("norm", [0.9, 1.1, 5.0])
def test_a_gradient_is_scaled_to_the_maximum_norm_and_never_up(tmp_path, norm):
    flags = trainer.parse([*SMALL, "--max-grad-norm", "1.0", "--out", str(tmp_path)])
    built = trainer.Trainer(flags.run, flags.method, trainer.build_task(flags))
    built.optimizer = torch.optim.SGD(built.parameters, lr=1.0)
    before = [p.detach().clone() for p in built.parameters]
    for p in built.parameters:
        p.grad = torch.zeros_like(p)
    built.parameters[0].grad.view(-1)[0] = norm
    assert built.optimizer_step(0.0) == pytest.approx(norm)
    moved = sum((p - old).square().sum() for p, old in zip(built.parameters, before)).sqrt()
    assert moved.item() == pytest.approx(min(norm, 1.0), rel=1e-4)


def test_metrics_against_a_hand_calculation(tmp_path, monkeypatch):
    """Rewards 0, 1, ..., 15 whatever the samples are; lambda = 3.5 leaves four of them below it."""
    monkeypatch.setattr(Modes, "reward", lambda self, sample, _: sample.sum(1) * 0 + torch.arange(len(sample)))
    (row,) = run(tmp_path, "--lam", "3.5", "--iterations", "1", "--method", "refl")
    assert row["loss"] == pytest.approx((3.5 + 2.5 + 1.5 + 0.5) / 16)
    assert (row["reward"], row["hinge_active"], row["weight"]) == (7.5, 4 / 16, 1)
    assert row.keys() == {*trainer.METRICS, "iteration"} - {"seconds", "d_j", "d_0", "i_k", "i_j", "leash", "v_norm"}
    (row,) = run(tmp_path / "leap", "--lam", "3.5", "--iterations", "1", "--tau", "50")
    assert row["weight"] == pytest.approx(1 / 100) and row["d_j"] >= 0 and row["d_0"] > 0


def test_a_leash_fills_its_columns_and_is_the_same_after_resuming(reference, tmp_path):
    """The reference is the pre-trained model, not that of the checkpoint; and beta may not change."""
    before = metrics(reference)
    assert not any({"leash", "v_norm"} & row.keys() for row in before)
    flags = [*LEASH, "--lr", "0.01"]
    first, *others = run(tmp_path / "whole", *flags)
    assert (first["leash"], first["v_norm"]) == (0, 1)  # the first step starts from the reference
    assert first["grad_norm"] == before[0]["grad_norm"] and first["loss"] == before[0]["loss"]
    assert all(row["leash"] > 0 and row["v_norm"] != 1 for row in others)
    run(tmp_path / "resumed", *flags, "--iterations", "2")
    assert "beta was 3.0, is 2.0" in error_line("--out", str(tmp_path / "resumed"), "--resume", "--beta", "2")
    assert run(tmp_path / "resumed", *flags, "--resume") == [first, *others]


def test_a_leash_keeps_the_model_near_the_reference(tmp_path):
    runs = [run(tmp_path / beta, "--beta", beta, "--lr", "0.01", "--iterations", "30") for beta in ("1e-9", "100")]
    far, near = (sum(row["leash"] for row in rows[10:]) for rows in runs)
    assert 0 < near < far / 3
    short = ["--beta", "1e-9", "--iterations", "2", "--tau"]
    light, heavy = (run(tmp_path / tau, *short, tau)[1]["leash"] for tau in ("500", "50"))
    assert heavy == pytest.approx(10 * light, rel=0.01)  # the weight of a sample is 1 / (2 tau)


BROKEN = {
    "gradient": lambda x: x.sum(1) + (0 * x.sum(1)).sqrt(),  # finite, but the gradient of sqrt at 0 is not
    "nan": lambda x: x.sum(1) * math.nan,
    "loss": lambda x: x.sum(1) - math.inf,  # whose gradient is finite
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_step_that_is_not_finite_is_skipped(kind, tmp_path, monkeypatch, capsys):
    """The weights, their average and the optimizer's state stay as they were."""
    unchanged = []

    def reward(self, sample, condition, good=Modes.reward):
        return BROKEN[kind](sample) if len(unchanged) == 2 else good(self, sample, condition)

    def recorded(self, loss, step=trainer.Trainer.optimizer_step):
        state = lambda: training_tensors(self.task.model, self.optimizer, self.ema)  # noqa: E731
        before = {name: value.clone() for name, value in state().items()}
        norm = step(self, loss)
        unchanged.append(all(torch.equal(value, before[name]) for name, value in state().items()))
        return norm

    monkeypatch.setattr(Modes, "reward", reward)
    monkeypatch.setattr(trainer.Trainer, "optimizer_step", recorded)
    rows = run(tmp_path)
    assert unchanged == [False, False, True, False] and [row["skipped"] for row in rows] == [0, 0, 1, 0]
    printed = capsys.readouterr().out
    assert "iteration 3: loss" in printed and "skipped" in printed
    assert ("body" in printed or "(0)" not in printed) == (kind != "loss")


REFUSALS = r"""
--task video ~ ^error: unknown task 'video': choose from toy, digits
--method ppo ~ ^error: unknown method 'ppo': choose from leap_align
--low 9 --high 22 ~ low=9, high=22 ; --method drtune --m 12 ~ m=12 must be at most
--method refl --m 22 ~ m=22 must be at most T=21 ; --method sparse --K 22 ~ K=22 must be at most T=21
--method lagrange --T 2 ~ T=2 must be at least 3 ; --checkpoint-every 0 ~ checkpoint_every=0
--batch-size 10 --gradient-accumulation-steps 4 ~ batch_size=10 must be a multiple of
--iterations -1 ~ iterations=-1 must lie between 0 and ; --max-grad-norm nan ~ ^error: max_grad_norm=nan
--lr -1 ~ lr=-1.0 must lie ; --lr inf ~ lr=inf must lie ; --lr nan ~ ^error: lr=nan must lie[^=]*$
--T 1000000000 ~ T=1000000000 must lie between 2 and 10000 ; --T 1 --method refl ~ T=1 must lie between 2 and
--weight-decay -1 ~ weight_decay=-1 ; --weight-decay inf ~ weight_decay=inf must lie between 0 and
--seed -1 ~ seed=-1 ; --seed 99999999999999999999 ~ seed=9+ must lie between 0 and
--beta -1 ~ ^error: beta=-1.0 must be at least 0 ; --shift 0 ~ ^error: shift=0
--alpha 1.5 ~ alpha=1.5 must lie in \[0, 1\] ; --alpha much ~ Error parsing --alpha: could not convert
--tau 0 ~ tau=0.0 must be positive ; --rho 2 ~ rho=2.0 must lie in \[0, 1\]
--evaluation-samples 3 ~ evaluation_samples=3 must be at least ; --evaluation-T 1 ~ evaluation_T=1 must be at least
--solver heun ~ --solver ; --alpah 0 ~ --alpah
"""


@pytest.mark.parametrize("row", REFUSALS.strip().replace(" ; ", "\n").splitlines())
def test_a_wrong_flag_is_refused_before_anything_is_written(row, tmp_path, capsys):
    flags, words = row.split(" ~ ")
    with pytest.raises(SystemExit) as stop:
        trainer.main([*SMALL, *flags.split(), "--out", str(tmp_path / "run")])
    text = capsys.readouterr().err if stop.value.code == 2 else stop.value.code
    assert re.search(words, text) and "Traceback" not in text and ("\n" not in text or stop.value.code == 2)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_folder_with_a_live_run_is_refused_and_the_run_undisturbed(reference, tmp_path, monkeypatch):
    refusals = []

    def start_twice_more(iteration):
        if iteration == 2 and not refusals:
            refusals.extend(error_line("--out", str(tmp_path), *flags) for flags in ([], ["--resume"]))

    before_every_step(monkeypatch, start_twice_more)
    assert run(tmp_path, "--checkpoint-every", "1") == metrics(reference)
    assert len(refusals) == 2 and all("is in use by another process" in line for line in refusals)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "evaluators"), [("toy", ["alignment"]), ("digits", ["svm", "forest"])])
def test_the_main_job_raises_the_held_out_evaluators(task, evaluators, tmp_path):
    """What the README shows."""
    trainer.main(["--task", task, "--out", str(tmp_path)])
    before, after = result(tmp_path)["before"], result(tmp_path)["after"]
    assert all(after[name] > before[name] for name in ("utility", *evaluators)) and after[evaluators[0]] > 0.95
