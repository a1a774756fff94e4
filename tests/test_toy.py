"""The toy tasks: what is learned, what the judges say, and that the training does not meet the judges."""

import dataclasses
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from leap_align import Hyper, rollout, uniform_times
from toy import learn
from toy.digits import Digits
from toy.modes import CENTRES, SPREAD, Modes
from toy.summary import table
from toy.task import ToyOptions
from toy.variants import nested_only, nested_trajectory

SMALL = ToyOptions(pretrain_steps=300, reward_steps=300, evaluation_samples=160)
HELD_OUT_ANSWERS = {Modes: ("alignment", "spread"), Digits: ("svm", "diversity")}


@pytest.fixture(scope="module", params=[Modes, Digits])
def task(request):
    return request.param(SMALL, T=10)


def test_judges_know_real_data_from_wrongly_captioned(task):
    name = HELD_OUT_ANSWERS[type(task)][0]
    samples, truth = task.data[:1000], task.truth[:1000]
    assert task.judge(samples, truth)[name] > 0.95
    assert task.judge(samples, (truth + 1) % task.classes)[name] < 0.05


def test_judges_see_collapse(task):
    name = HELD_OUT_ANSWERS[type(task)][1]
    samples, truth = task.data[:1000], task.truth[:1000]
    centre = torch.stack([task.data[task.truth == c].mean(0) for c in range(task.classes)])[truth]
    half = torch.lerp(samples, centre, 0.5)
    assert task.judge(half, truth)[name] == pytest.approx(task.judge(samples, truth)[name] / 2, rel=0.02)


def test_utility_is_highest_for_what_is_shown(task):
    assert (task.utility(task.data[:500]).argmax(1) == task.truth[:500]).float().mean() > 0.98


def test_choices_follow_the_hidden_utility(task):
    chosen, other, prompt = task.choices(task.data, n=4000)
    lead = (task.utility(chosen) - task.utility(other)).gather(1, prompt[:, None])[:, 0]
    # People choose the better one with probability sigmoid(|lead|), so the share of better choices has that mean.
    assert (lead > 0).double().mean().item() == pytest.approx(lead.abs().sigmoid().mean().item(), abs=0.02)


def test_learned_reward_ranks_as_people_do(task):
    chosen, other, prompt = task.choices(task.data, n=4000)
    with torch.no_grad():
        right = (task.reward(chosen, prompt) > task.reward(other, prompt)).float().mean()
    assert right > 0.8


def test_zero_of_the_reward_is_real_data(task):
    with torch.no_grad():
        assert task.reward(task.data, task.truth).mean().item() == pytest.approx(0, abs=1e-4)


def test_reward_gives_gradient_to_every_sample_and_is_frozen(task):
    sample = task.data[:8].clone().requires_grad_()
    task.reward(sample, task.truth[:8]).sum().backward()
    assert (sample.grad.flatten(1).norm(dim=1) > 0).all()
    assert not any(p.requires_grad for p in task.reward_model.parameters())


def test_flow_learns_its_captions_half_of_which_are_wrong():
    task = Modes(ToyOptions(pretrain_steps=1500, reward_steps=1), T=25)
    alignment = task.evaluate(None, 0)["alignment"]
    assert 0.4 < alignment < 0.65


def test_evaluation_repeats_itself_and_leaves_the_training_draws_alone(task):
    generator = torch.Generator().manual_seed(3)
    global_state, own_state = torch.get_rng_state(), generator.get_state()
    first, second = task.evaluate(None, 0), task.evaluate(None, 7)
    assert first == second
    assert torch.equal(global_state, torch.get_rng_state())
    assert torch.equal(own_state, generator.get_state())


def test_log_density_is_that_of_the_mixture():
    task = Modes(SMALL, T=10)
    # At a centre the nearest component has density 1/(2 pi s^2) and weight 1/8; the others are 1.5 or more away.
    expected = math.log(1 / 8 / (2 * math.pi * SPREAD**2))
    assert task.judge(CENTRES.repeat(4, 1), torch.arange(32) % 8)["log_density"] == pytest.approx(expected, abs=1e-6)


def test_digits_halves_are_disjoint():
    task = Digits(SMALL, T=10)
    ours, theirs = ({row.numpy().tobytes() for row in x} for x in (task.data.flatten(1), task.unseen))
    assert len(task.data) + len(task.unseen) == 1797
    assert not ours & theirs


def test_cache_is_read_and_its_key_follows_what_made_it(task, monkeypatch):
    def refuse(self):
        raise AssertionError("pre-trained again")

    monkeypatch.setattr(type(task), "pretrain", refuse)
    again = type(task)(SMALL, T=10)
    for a, b in zip(task.model.state_dict().values(), again.model.state_dict().values()):
        assert torch.equal(a, b)
    with pytest.raises(AssertionError, match="pre-trained again"):
        type(task)(ToyOptions(pretrain_steps=301, reward_steps=300), T=10)


def test_the_reward_does_not_depend_on_the_grid_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(learn, "CACHE", tmp_path / "one")
    few = ToyOptions(pretrain_steps=20, reward_steps=20)
    one = Modes(few, T=3)
    monkeypatch.setattr(learn, "CACHE", tmp_path / "other")
    other = Modes(dataclasses.replace(few, shift=3.0), T=10)
    for a, b in zip(one.reward_model.state_dict().values(), other.reward_model.state_dict().values()):
        assert torch.equal(a, b)


class _Evil:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_the_cache_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(learn, "CACHE", tmp_path)
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
    method = nested_only(task.velocity(prompt), x_T, task.times, hyper, torch.Generator().manual_seed(1))
    x_0, weight = next(method)
    with pytest.raises(StopIteration) as end:
        next(method)
    i_k, i_j = end.value.value["i_k"], end.value.value["i_j"]
    states = rollout(task.velocity(prompt), x_T, task.times)
    trajectory = nested_trajectory(task.velocity(prompt), states, task.times, i_k, i_j, hyper.alpha)
    parameters = list(task.model.parameters())
    found = torch.autograd.grad(x_0.sum(), parameters)
    expected = torch.autograd.grad(trajectory.x_0.sum(), parameters)
    assert weight.shape == (8,)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


def test_pretraining_leaves_no_gradient_behind(tmp_path, monkeypatch):
    """Left-over gradients would join the first step of a run that pre-trains, and not of one that finds the cache."""
    monkeypatch.setattr(learn, "CACHE", tmp_path)
    task = Modes(ToyOptions(pretrain_steps=2, reward_steps=2), T=2)
    assert all(p.grad is None for p in [*task.model.parameters(), *task.reward_model.parameters()])


def test_save_and_load(task, tmp_path):
    task.save(tmp_path)
    kept = {name: value.clone() for name, value in task.model.state_dict().items()}
    with torch.no_grad():
        for p in task.model.parameters():
            p.add_(1)
    task.load(tmp_path)
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, kept[name])


def test_pictures_are_drawn(task, tmp_path):
    for iteration in (0, 5):
        task.evaluate(tmp_path, iteration)
    task.draw(tmp_path)
    for name in ("samples.png", "trajectories.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    kept = np.load(tmp_path / "samples" / "000005.npz")
    assert np.array_equal(kept["states"][0], kept["samples"][: len(kept["states"][0])])


def test_tasks_take_a_shifted_grid():
    task = Modes(ToyOptions(pretrain_steps=300, reward_steps=300, shift=2.2243), T=10)
    assert task.times[5] > uniform_times(10)[5]
    states = rollout(task.velocity(task.truth[:4]), task.noise(4, torch.Generator().manual_seed(0)), task.times)
    assert len(states) == 11


def test_summary_by_hand(tmp_path):
    for n, value in enumerate((1.0, 2.0, 6.0)):
        (tmp_path / str(n)).mkdir()
        result = {"before": {"judge": 0.0}, "after": {"judge": value}}
        (tmp_path / str(n) / "result.json").write_text(json.dumps(result))
    # Mean 3, standard deviation sqrt((4 + 1 + 9) / 2) = sqrt(7), of the mean sqrt(7 / 3) = 1.528.
    assert table([tmp_path / str(n) for n in range(3)]).endswith("| judge | 0.000 ± 0.000 | 3.000 ± 1.528 |")


def test_defaults_are_known_fields(task):
    from train_leap_align import Config

    assert set(task.defaults(None)) <= set(Config.__dataclass_fields__) | set(Hyper.__dataclass_fields__)
    assert set(task.held_out) < set(task.evaluate(None, 0))
