"""The toy tasks: what they learn, what their evaluators measure, and that training never sees the evaluators."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from leap_align import Hyper, uniform_times
from tests.toy_runs import flip_a_bit
from toy import pretrain
from toy.digits import Digits
from toy.modes import CENTRES, SPREAD, Modes
from toy.summary import format_number, markdown_table, mean_and_error, summary
from toy.summary import main as print_summary
from toy.task import ToyOptions
from train_leap_align import Config

SMALL = ToyOptions(pretrain_steps=300, reward_steps=300, evaluation_samples=160)
FEW = ToyOptions(pretrain_steps=2, reward_steps=2)


@pytest.fixture(scope="module", params=[Modes, Digits])
def task(request):
    return request.param(SMALL, T=10)


def weights(task, *names):
    return [value.clone() for name in names for value in getattr(task, name).state_dict().values()]


def all_equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_evaluators_know_right_captions_and_diversity(task):
    """Diversity halves when samples move halfway to their mean."""
    alignment, diversity = {"toy": ("alignment", "spread"), "digits": ("svm", "diversity")}[task.name]
    samples, truth = task.data[:1000], task.truth[:1000]
    right, wrong = (task.evaluate_held_out(samples, (truth + shift) % task.classes) for shift in (0, 1))
    assert right[alignment] > 0.95 and wrong[alignment] < 0.05
    centre = torch.stack([task.data[task.truth == c].mean(0) for c in range(task.classes)])[truth]
    half = task.evaluate_held_out(torch.lerp(samples, centre, 0.5), truth)
    assert half[diversity] == pytest.approx(right[diversity] / 2, rel=0.02)
    if task.name == "toy":
        # At a centre the nearest component has density 1/(2 pi s^2) and weight 1/8; the others are 1.5 or more away.
        found = task.evaluate_held_out(CENTRES.repeat(4, 1), torch.arange(32) % 8)["log_density"]
        assert found == pytest.approx(math.log(1 / 8 / (2 * math.pi * SPREAD**2)), abs=1e-6)


def test_digits_halves_are_disjoint_and_its_evaluators_know_the_unseen_one():
    task = Digits(SMALL, T=10)
    flat = {"seen": task.data.flatten(1), "unseen": task.unseen}
    rows = {name: {row.numpy().tobytes() for row in x} for name, x in flat.items()}
    assert len(task.data) + len(task.unseen) == 1797 and not rows["seen"] & rows["unseen"]
    assert {row.tobytes() for row in task.svm.support_vectors_.astype("float32")} <= rows["unseen"]
    confidence = {name: task.forest.predict_proba(x).max(1).mean() for name, x in flat.items()}
    assert confidence["unseen"] > confidence["seen"] + 0.05
    found = {name: task.evaluate_held_out(x, torch.arange(len(x)) % 10)["nearest_real"] for name, x in flat.items()}
    assert found["unseen"] == pytest.approx(0, abs=1e-2) and found["seen"] > 1


def test_evaluation_is_repeatable_and_uses_no_training_random_numbers(task):
    states = torch.get_rng_state(), task.generator.get_state()
    assert task.evaluate(None, 0) == task.evaluate(None, 7)
    assert all_equal(states, (torch.get_rng_state(), task.generator.get_state()))
    assert set(task.defaults(None)) <= set(Config.__dataclass_fields__) | set(Hyper.__dataclass_fields__)
    assert set(task.held_out) < set(task.evaluate(None, 0))


def test_utility_is_highest_for_the_true_class(task):
    assert (task.utility(task.data[:500]).argmax(1) == task.truth[:500]).float().mean() > 0.98


def test_choices_follow_the_hidden_utility_and_the_learned_reward_the_choices(task):
    chosen, other, prompt = task.choices(task.data, n=4000)
    lead = (task.utility(chosen) - task.utility(other)).gather(1, prompt[:, None])[:, 0]
    # People choose the better one with probability sigmoid(|lead|), so the share of better choices has that mean.
    assert (lead > 0).double().mean().item() == pytest.approx(lead.abs().sigmoid().mean().item(), abs=0.02)
    with torch.no_grad():
        assert (task.reward(chosen, prompt) > task.reward(other, prompt)).float().mean() > 0.8


def test_the_reward_is_frozen_differentiable_and_zero_on_real_data(task):
    sample = task.data[:8].clone().requires_grad_()
    task.reward(sample, task.truth[:8]).sum().backward()
    assert (sample.grad.flatten(1).norm(dim=1) > 0).all()
    assert not any(p.requires_grad for p in task.reward_model.parameters())
    with torch.no_grad():
        assert task.reward(task.data, task.truth).mean().item() == pytest.approx(0, abs=1e-4)


def test_the_pretrained_flow_follows_half_of_its_prompts():
    task = Modes(ToyOptions(pretrain_steps=1500, reward_steps=1), T=25)
    assert 0.4 < task.evaluate(None, 0)["alignment"] < 0.65


def test_save_and_load(task, tmp_path):
    task.save(tmp_path)
    saved = weights(task, "model")
    with torch.no_grad():
        for p in task.model.parameters():
            p.add_(1)
    task.load(tmp_path)
    assert all_equal(weights(task, "model"), saved)


def test_the_cache_is_read_and_its_key_depends_on_settings_and_code(task, monkeypatch):
    again = Mock(side_effect=AssertionError("pre-trained again"))
    monkeypatch.setattr(type(task), "pretrain", again)
    assert all_equal(weights(task, "model"), weights(type(task)(SMALL, T=10), "model"))
    with pytest.raises(AssertionError, match="pre-trained again"):
        type(task)(dataclasses.replace(SMALL, pretrain_steps=301), T=10)
    monkeypatch.setattr(pretrain.inspect, "getsource", lambda _: "other code")
    with pytest.raises(AssertionError, match="pre-trained again"):
        type(task)(SMALL, T=10)


def test_pretraining_depends_on_no_grid_and_leaves_no_gradient(tmp_path, monkeypatch):
    """A leftover gradient would enter the first step of a run that pre-trains, but not of one that reads the cache."""
    tasks = []
    for name, options, T in (("one", FEW, 3), ("other", dataclasses.replace(FEW, shift=3.0), 10)):
        monkeypatch.setattr(pretrain, "CACHE", tmp_path / name)
        tasks.append(Modes(options, T))
    assert all_equal(*(weights(task, "reward_model") for task in tasks))
    assert tasks[1].times[5] > uniform_times(10)[5]
    assert all(p.grad is None for task in tasks for p in (*task.model.parameters(), *task.reward_model.parameters()))


class _Evil:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


DAMAGES = {
    "end missing": lambda file, size: os.truncate(file, size - 10),
    "one bit": lambda file, size: flip_a_bit(file, size // 2),  # of a weight
    "code": lambda file, size: torch.save({"flow": _Evil()}, file),
    "a list": lambda file, size: torch.save([1], file),
    "other weights": lambda file, size: torch.save({"flow.body.0.bias": torch.zeros(3)}, file),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_file_is_named_and_made_anew_and_runs_no_code(damage, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    before = weights(Modes(FEW, T=3), "model", "reward_model")
    (file,) = pretrain.CACHE.glob("*.pt")
    DAMAGES[damage](file, file.stat().st_size)
    capsys.readouterr()
    after = weights(Modes(FEW, T=3), "model", "reward_model")
    assert capsys.readouterr().out == f"{file} is damaged: it is removed, and the networks are pre-trained again\n"
    assert all_equal(before, after) and not Path("executed").exists()
    Modes(FEW, T=3)
    assert not capsys.readouterr().out


def test_figures_are_drawn_and_other_files_among_the_samples_do_no_harm(task, tmp_path):
    """A copy that a user made kept every later evaluation from being saved."""
    task.evaluate(tmp_path, 0)
    others = {"000000-mine.npz", "9notes.npz", "best.npz"}
    for name in others:
        shutil.copy(tmp_path / "samples" / "000000.npz", tmp_path / "samples" / name)
    task.evaluate(tmp_path, 5)
    task.draw_figures(tmp_path)
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("samples.png", "trajectories.png"))
    arrays = np.load(tmp_path / "samples" / "000005.npz")
    assert np.array_equal(arrays["states"][0], arrays["samples"][: len(arrays["states"][0])])
    task.evaluate(tmp_path, 3)  # a resumed run repeats later iterations
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"000000.npz", "000003.npz", *others}


def finished_run(folder, after=0.0, **settings):
    """The files of a finished run that its summary reads."""
    folder.mkdir()
    config = {"tool": "train_leap_align", "task": "toy", "method": "leap_align", "seed": 0, "out": str(folder)}
    (folder / "config.json").write_text(json.dumps(config | settings))
    (folder / "result.json").write_text(json.dumps({"before": {"evaluator": 0.0}, "after": {"evaluator": after}}))
    return folder


def test_summary_against_a_hand_calculation(tmp_path):
    """Of runs that differ in speed and seed alone."""
    values, more = (1.0, 2.0, 6.0), ({}, {"gradient_accumulation_steps": 2}, {"resume": True, "evaluate_every": 7})
    folders = [finished_run(tmp_path / str(seed), values[seed], seed=seed, **more[seed]) for seed in range(3)]
    # Mean 3, standard deviation sqrt((4 + 1 + 9) / 2) = sqrt(7), of the mean sqrt(7 / 3) = 1.528.
    table = "| n = 3 | before | after |\n|---|---|---|\n| evaluator | 0.000 ± 0.000 | 3.000 ± 1.528 |"
    assert summary(folders).rstrip() == table


SHARED = {"lr": 1e-4, "lam": 0.0, "iterations": 300}
OTHERS = {"method": "drtune", "task": "digits", "lr": 1e-3, "lam": None, "iterations": 60, "pretrain_seed": 3}
REFUSED = [
    ({}, "", "", "have the same seed, 0"),
    *(({"seed": 1, name: x}, "", "", rf"{name} is .* in .*a, {x} in .*b; summ.* sep") for name, x in OTHERS.items()),
    ({"seed": 1}, "result.json", "", "holds no finished run: result.json is missing"),
    ({"seed": 1}, "result.json", "{}", "it has no `before` and `after`"),
    ({"seed": 1}, "result.json", "{", "result.json is damaged"),
    ({"seed": 1}, "config.json", "", "config.json is missing"),
    ({"seed": 1}, "config.json", "[]", "must hold a JSON object"),
]


@pytest.mark.parametrize("settings, file, content, words", REFUSED)  # a file without content is removed
def test_summary_refuses_runs_that_do_not_belong_together(settings, file, content, words, tmp_path, monkeypatch):
    folders = [finished_run(tmp_path / "a", **SHARED), finished_run(tmp_path / "b", **SHARED | settings)]
    if file:
        (folders[1] / file).write_text(content) if content else (folders[1] / file).unlink()
    monkeypatch.setattr("sys.argv", ["summary", *map(str, folders)])
    with pytest.raises(SystemExit, match=rf"^error: [^\n]*{words}[^\n]*$"):
        print_summary()


def test_numbers_in_tables():
    assert mean_and_error([1.0, 2.0, 6.0]) == (3.0, pytest.approx(1.5275, abs=1e-4))
    assert (format_number(0.12345, 0.0004), format_number(-0.00123, 0.01)) == ("0.123 ± 0.000", "-0.001 ± 0.010")
    assert [format_number(value) for value in (12345.0, 0.000123, 0.0, 7)] == ["12345.000", "0.000123", "0.000", "7"]
    table = markdown_table([{"a": 1.0, "a_error": 0.5, "b": "x"}, {"b": "y"}], ["b", "a"])
    assert table == "| b | a |\n|---|---|\n| x | 1.000 ± 0.500 |\n| y |  |"
