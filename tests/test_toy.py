"""The toy tasks: what they learn, what their evaluators measure, and that training never sees the evaluators."""

import dataclasses
import io
import itertools
import json
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from leap_align import BadInput, Hyper, rollout, uniform_times
from runtime import report
from tests.toy_runs import ROOT
from toy import pretrain
from toy.digits import Digits
from toy.laboratory.variants import nested_only, nested_trajectory
from toy.modes import CENTRES, SPREAD, Modes
from toy.summary import format_number, markdown_table, mean_and_error, summary
from toy.summary import main as print_summary
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
    Modes(few, T=3)
    assert not Path("executed").exists()
    assert all(torch.is_tensor(value) for value in torch.load(file, weights_only=True).values())


def flip_a_bit(content):
    """The bytes with one bit of a weight changed."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 64]) + content[middle + 1 :]


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


DAMAGES = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "end missing": lambda content: content[:-10],
    "one bit": flip_a_bit,
    "a pickle": lambda content: pickle.dumps([1]),
    "a list": lambda content: saved([1]),
    "other weights": lambda content: saved({"flow.body.0.bias": torch.zeros(3)}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_file_is_named_and_made_anew(damage, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "CACHE", tmp_path)
    few = ToyOptions(pretrain_steps=2, reward_steps=2)
    before = Modes(few, T=3)
    (file,) = tmp_path.glob("*.pt")
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    capsys.readouterr()
    after = Modes(few, T=3)
    assert capsys.readouterr().out == f"{file} is damaged: it is removed, and the networks are pre-trained again\n"
    for name in ("model", "reward_model"):
        weights = (getattr(task, name).state_dict().values() for task in (before, after))
        assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    Modes(few, T=3)
    assert not capsys.readouterr().out


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


def test_other_files_among_the_samples_do_no_harm(tmp_path):
    """A copy that a user made kept every later evaluation from being saved."""
    task = Modes(SMALL, T=10)
    task.evaluate(tmp_path, 0)
    for name in ("000000-mine.npz", "9notes.npz", "best.npz"):
        shutil.copy(tmp_path / "samples" / "000000.npz", tmp_path / "samples" / name)
    task.evaluate(tmp_path, 5)
    task.draw_figures(tmp_path)
    task.evaluate(tmp_path, 3)  # a resumed run repeats later iterations
    names = {path.name for path in (tmp_path / "samples").iterdir()}
    assert names == {"000000.npz", "000003.npz", "000000-mine.npz", "9notes.npz", "best.npz"}


@pytest.fixture
def figures(monkeypatch):
    """Name, without .png, -> the matplotlib figure that was saved there."""
    saved_figures = {}

    def savefig(self, path, **_):
        saved_figures[Path(path).name.split(".png")[0]] = self
        Path(path).touch()

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved_figures


@pytest.mark.parametrize("kind", [Modes, Digits])
@pytest.mark.parametrize(("iterations", "title"), [((0, 5), "after 5 iterations"), ((0,), "before training")])
def test_the_figure_of_trajectories_says_when(kind, iterations, title, tmp_path, figures):
    task = kind(SMALL, T=10)
    for iteration in iterations:
        task.evaluate(tmp_path, iteration)
    task.draw_figures(tmp_path)
    figure = figures["trajectories"]
    assert title in f"{figure.get_suptitle()} {figure.axes[0].get_title()}"


def test_no_label_of_the_trajectories_covers_another(tmp_path, figures):
    task = Modes(SMALL, T=10)
    task.evaluate(tmp_path, 0)
    task.draw_figures(tmp_path)
    figure = figures["trajectories"]
    figure.set_dpi(120)
    FigureCanvasAgg(figure).draw()
    labels = [text for text in figure.axes[0].texts if text.get_text()]
    assert {"$x_T$", "$x_k$", "$x_j$", "$x_0$"} <= {text.get_text() for text in labels}
    boxes = [Text.get_window_extent(text) for text in labels]  # without its line
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_the_curves_say_which_weights_they_are_of(tmp_path, figures):
    evaluations = [{"iteration": i, "reward": float(i), "utility": 0.0} for i in range(3)]
    report.draw_curves(tmp_path, evaluations, [{"iteration": "1", "reward": "0.5"}])
    (figure,) = figures.values()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["batch, live weights", "evaluation, averaged weights"]


def test_the_hacked_and_the_hinged_sheet_differ_at_the_size_of_the_page():
    """At 430 pixels each, side by side; the sheets of 20 columns that they replaced differed in 1160 pixels."""
    images = []
    for name in ("hacked", "hinged"):
        image = Image.open(ROOT / "toy" / "results" / f"digits-{name}.png").convert("L")
        images.append(np.asarray(image.resize((430, image.height * 430 // image.width)), dtype=float) / 255)
    assert (abs(images[0] - images[1]) > 0.2).sum() > 3000


def test_tasks_take_a_shifted_grid():
    task = Modes(ToyOptions(pretrain_steps=300, reward_steps=300, shift=2.2243), T=10)
    assert task.times[5] > uniform_times(10)[5]
    states = rollout(task.velocity(task.truth[:4]), task.noise(4, torch.Generator().manual_seed(0)), task.times)
    assert len(states) == 11


def finished_run(folder, after=0.0, **settings):
    """The files of a finished run that its summary reads."""
    folder.mkdir()
    config = {"tool": "train_leap_align", "task": "toy", "method": "leap_align", "seed": 0, "out": str(folder)}
    (folder / "config.json").write_text(json.dumps(config | settings))
    (folder / "result.json").write_text(json.dumps({"before": {"evaluator": 0.0}, "after": {"evaluator": after}}))
    return folder


def test_summary_against_a_hand_calculation(tmp_path):
    values = (1.0, 2.0, 6.0)
    folders = [finished_run(tmp_path / str(seed), value, seed=seed) for seed, value in enumerate(values)]
    # Mean 3, standard deviation sqrt((4 + 1 + 9) / 2) = sqrt(7), of the mean sqrt(7 / 3) = 1.528.
    assert summary(folders).splitlines() == [
        "| n = 3 | before | after |",
        "|---|---|---|",
        "| evaluator | 0.000 ± 0.000 | 3.000 ± 1.528 |",
    ]


def test_summary_allows_runs_that_differ_in_speed_alone(tmp_path):
    folders = [finished_run(tmp_path / "a"), finished_run(tmp_path / "b", seed=1, gradient_accumulation_steps=2)]
    assert summary([*folders, finished_run(tmp_path / "c", seed=2, resume=True, evaluate_every=7)])


@pytest.mark.parametrize("settings", [
    {"method": "drtune"}, {"task": "digits"}, {"lr": 1e-3}, {"lam": None}, {"iterations": 60}, {"pretrain_seed": 3},
])  # fmt: skip
def test_summary_refuses_runs_that_differ_in_more_than_their_seed(settings, tmp_path):
    shared = {"lr": 1e-4, "lam": 0.0, "iterations": 300}
    other = shared | {"seed": 1} | settings
    folders = [finished_run(tmp_path / "a", **shared), finished_run(tmp_path / "b", **other)]
    ((name, value),) = settings.items()
    with pytest.raises(BadInput, match=rf"{name} is .* in .*a, {value} in .*b; summarise them separately$"):
        summary(folders)


def test_summary_refuses_a_run_that_is_given_twice(tmp_path):
    folders = [finished_run(tmp_path / "a", seed=4), finished_run(tmp_path / "b", seed=4)]
    for twice in (folders, [folders[0], folders[0]]):
        with pytest.raises(BadInput, match="have the same seed, 4"):
            summary(twice)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("result.json", None, "holds no finished run: result.json is missing"),
    ("result.json", "{}", "it has no `before` and `after`"),
    ("result.json", "{", "result.json is damaged"),
    ("config.json", None, "config.json is missing"),
    ("config.json", "[]", "must hold a JSON object"),
])  # fmt: skip
def test_summary_names_a_file_that_is_not_a_runs(name, content, message, tmp_path, monkeypatch):
    folder = finished_run(tmp_path / "a")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    monkeypatch.setattr("sys.argv", ["summary", str(folder)])
    with pytest.raises(SystemExit, match=message) as stop:
        print_summary()
    assert str(stop.value).startswith("error: ") and "\n" not in str(stop.value)


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
