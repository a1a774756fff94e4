"""The toy tasks: what they learn, what their evaluators measure, and that training never sees the evaluators."""

import dataclasses
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from leap_align import Hyper, rollout, uniform_times
from toy import pretrain
from toy.digits import Digits
from toy.laboratory.variants import nested_only, nested_trajectory
from toy.modes import CENTRES, SPREAD, Modes
from toy.summary import format_number, markdown_table, mean_and_error, summary
from toy.task import ToyOptions

SMALL = ToyOptions(pretrain_steps=300, reward_steps=300, evaluation_samples=160)
EVALUATORS = {Modes: ("alignment", "spread"), Digits: ("svm", "diversity")}
"""For each task: an evaluator of alignment with the prompt, and one of diversity."""


@pytest.fixture(scope="module", params=[Modes, Digits])
def task(request):
    return request.param(SMALL, T=10)


def test_evaluators_tell_right_captions_from_wrong_ones(task):
    name = EVALUATORS[type(task)][0]
    samples, truth = task.data[:1000], task.truth[:1000]
    assert task.evaluate_held_out(samples, truth)[name] > 0.95
    assert task.evaluate_held_out(samples, (truth + 1) % task.classes)[name] < 0.05


def test_diversity_halves_when_samples_move_halfway_to_their_mean(task):
    name = EVALUATORS[type(task)][1]
    samples, truth = task.data[:1000], task.truth[:1000]
    centre = torch.stack([task.data[task.truth == c].mean(0) for c in range(task.classes)])[truth]
    half = torch.lerp(samples, centre, 0.5)
    expected = task.evaluate_held_out(samples, truth)[name] / 2
    assert task.evaluate_held_out(half, truth)[name] == pytest.approx(expected, rel=0.02)


def test_utility_is_highest_for_the_true_class(task):
    assert (task.utility(task.data[:500]).argmax(1) == task.truth[:500]).float().mean() > 0.98


def test_choices_follow_the_hidden_utility(task):
    chosen, other, prompt = task.choices(task.data, n=4000)
    lead = (task.utility(chosen) - task.utility(other)).gather(1, prompt[:, None])[:, 0]
    # People choose the better one with probability sigmoid(|lead|), so the share of better choices has that mean.
    assert (lead > 0).double().mean().item() == pytest.approx(lead.abs().sigmoid().mean().item(), abs=0.02)


def test_the_learned_reward_agrees_with_the_choices(task):
    chosen, other, prompt = task.choices(task.data, n=4000)
    with torch.no_grad():
        right = (task.reward(chosen, prompt) > task.reward(other, prompt)).float().mean()
    assert right > 0.8


def test_the_mean_reward_of_real_data_is_zero(task):
    with torch.no_grad():
        assert task.reward(task.data, task.truth).mean().item() == pytest.approx(0, abs=1e-4)


def test_the_reward_is_frozen_and_differentiable(task):
    sample = task.data[:8].clone().requires_grad_()
    task.reward(sample, task.truth[:8]).sum().backward()
    assert (sample.grad.flatten(1).norm(dim=1) > 0).all()
    assert not any(p.requires_grad for p in task.reward_model.parameters())


def test_the_pretrained_flow_follows_half_of_its_prompts():
    task = Modes(ToyOptions(pretrain_steps=1500, reward_steps=1), T=25)
    alignment = task.evaluate(None, 0)["alignment"]
    assert 0.4 < alignment < 0.65


def test_evaluation_is_repeatable_and_uses_no_training_random_numbers(task):
    generator = torch.Generator().manual_seed(3)
    global_state, own_state = torch.get_rng_state(), generator.get_state()
    first, second = task.evaluate(None, 0), task.evaluate(None, 7)
    assert first == second
    assert torch.equal(global_state, torch.get_rng_state())
    assert torch.equal(own_state, generator.get_state())


def test_log_density_is_the_mixtures():
    task = Modes(SMALL, T=10)
    # At a centre the nearest component has density 1/(2 pi s^2) and weight 1/8; the others are 1.5 or more away.
    expected = math.log(1 / 8 / (2 * math.pi * SPREAD**2))
    values = task.evaluate_held_out(CENTRES.repeat(4, 1), torch.arange(32) % 8)
    assert values["log_density"] == pytest.approx(expected, abs=1e-6)


def test_digits_halves_are_disjoint():
    task = Digits(SMALL, T=10)
    seen, unseen = ({row.numpy().tobytes() for row in x} for x in (task.data.flatten(1), task.unseen))
    assert len(task.data) + len(task.unseen) == 1797
    assert not seen & unseen


def test_the_cache_is_read_and_its_key_depends_on_the_settings(task, monkeypatch):
    def refuse(self):
        raise AssertionError("pre-trained again")

    monkeypatch.setattr(type(task), "pretrain", refuse)
    again = type(task)(SMALL, T=10)
    for a, b in zip(task.model.state_dict().values(), again.model.state_dict().values()):
        assert torch.equal(a, b)
    with pytest.raises(AssertionError, match="pre-trained again"):
        type(task)(ToyOptions(pretrain_steps=301, reward_steps=300), T=10)


def test_the_reward_does_not_depend_on_the_grid_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "CACHE", tmp_path / "one")
    few = ToyOptions(pretrain_steps=20, reward_steps=20)
    one = Modes(few, T=3)
    monkeypatch.setattr(pretrain, "CACHE", tmp_path / "other")
    other = Modes(dataclasses.replace(few, shift=3.0), T=10)
    for a, b in zip(one.reward_model.state_dict().values(), other.reward_model.state_dict().values()):
        assert torch.equal(a, b)


class _Evil:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_the_cache_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain, "CACHE", tmp_path)
    few = ToyOptions(pretrain_steps=2, reward_steps=2)
    Modes(few, T=3)
    (file,) = tmp_path.glob("*.pt")
    torch.save({"flow": _Evil()}, file)
    with pytest.raises(pickle.UnpicklingError):
        Modes(few, T=3)
    assert not Path("executed").exists()


def test_nested_only_is_a_method_with_the_nested_trajectory(task):
    prompt, x_T = task.truth[:8], task.noise(8, torch.Generator().manual_seed(0))
    hyper = Hyper(low=2, high=8)
    endpoints = nested_only(task.velocity(prompt), x_T, task.times, hyper, torch.Generator().manual_seed(1))
    ((x_0, weight),) = endpoints
    i_k, i_j = endpoints.log["i_k"], endpoints.log["i_j"]
    states = rollout(task.velocity(prompt), x_T, task.times)
    trajectory = nested_trajectory(task.velocity(prompt), states, task.times, i_k, i_j, hyper.alpha)
    parameters = list(task.model.parameters())
    found = torch.autograd.grad(x_0.sum(), parameters)
    expected = torch.autograd.grad(trajectory.x_0.sum(), parameters)
    assert weight.shape == (8,)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


def test_pretraining_leaves_no_gradient(tmp_path, monkeypatch):
    """A leftover gradient would enter the first step of a run that pre-trains, but not of one that reads the cache."""
    monkeypatch.setattr(pretrain, "CACHE", tmp_path)
    task = Modes(ToyOptions(pretrain_steps=2, reward_steps=2), T=2)
    assert all(p.grad is None for p in [*task.model.parameters(), *task.reward_model.parameters()])


def test_save_and_load(task, tmp_path):
    task.save(tmp_path)
    saved = {name: value.clone() for name, value in task.model.state_dict().items()}
    with torch.no_grad():
        for p in task.model.parameters():
            p.add_(1)
    task.load(tmp_path)
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, saved[name])


def test_figures_are_drawn(task, tmp_path):
    for iteration in (0, 5):
        task.evaluate(tmp_path, iteration)
    task.draw_figures(tmp_path)
    for name in ("samples.png", "trajectories.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    arrays = np.load(tmp_path / "samples" / "000005.npz")
    assert np.array_equal(arrays["states"][0], arrays["samples"][: len(arrays["states"][0])])


def test_tasks_take_a_shifted_grid():
    task = Modes(ToyOptions(pretrain_steps=300, reward_steps=300, shift=2.2243), T=10)
    assert task.times[5] > uniform_times(10)[5]
    states = rollout(task.velocity(task.truth[:4]), task.noise(4, torch.Generator().manual_seed(0)), task.times)
    assert len(states) == 11


def test_summary_against_a_hand_calculation(tmp_path):
    for n, value in enumerate((1.0, 2.0, 6.0)):
        (tmp_path / str(n)).mkdir()
        result = {"before": {"evaluator": 0.0}, "after": {"evaluator": value}}
        (tmp_path / str(n) / "result.json").write_text(json.dumps(result))
    # Mean 3, standard deviation sqrt((4 + 1 + 9) / 2) = sqrt(7), of the mean sqrt(7 / 3) = 1.528.
    assert summary([tmp_path / str(n) for n in range(3)]).splitlines() == [
        "| n = 3 | before | after |",
        "|---|---|---|",
        "| evaluator | 0.000 ± 0.000 | 3.000 ± 1.528 |",
    ]


def test_numbers_in_tables():
    assert mean_and_error([1.0, 2.0, 6.0]) == (3.0, pytest.approx(1.5275, abs=1e-4))
    assert (format_number(0.12345, 0.0004), format_number(-0.00123, 0.01)) == ("0.123 ± 0.000", "-0.001 ± 0.010")
    assert [format_number(value) for value in (12345.0, 0.000123, 0.0, 7)] == ["12345.000", "0.000123", "0.000", "7"]
    table = markdown_table([{"a": 1.0, "a_error": 0.5, "b": "x"}, {"b": "y"}], ["b", "a"])
    assert table == "| b | a |\n|---|---|\n| x | 1.000 ± 0.500 |\n| y |  |"


def test_defaults_are_known_fields(task):
    from train_leap_align import Config

    assert set(task.defaults(None)) <= set(Config.__dataclass_fields__) | set(Hyper.__dataclass_fields__)
    assert set(task.held_out) < set(task.evaluate(None, 0))
