"""Code that a user adds, and packages that a user has not installed: a failure names them in one line."""

import copy
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import train_leap_align as trainer
from full_scale import __main__ as tools
from leap_align import BadInput, rollout, uniform_times
from runtime.processes import StoppedBySignal, UserCodeError, user_code
from runtime.task import SET_BY_INIT, Task
from tests.toy_runs import ROOT


@dataclass(frozen=True)
class Options:
    """No flags."""


class Mine:
    """The smallest task: the reward is high where both coordinates of a sample are."""

    Options = Options
    changeable_on_resume = frozenset()
    held_out = {"spread": -0.1}  # noqa: RUF012
    step_metric_names = ()
    device = torch.device("cpu")

    def __init__(self, options, T):
        self.model, self.times = nn.Linear(2, 2), uniform_times(T)

    @classmethod
    def defaults(cls, reward):
        return {"T": 4, "iterations": 1, "batch_size": 4}

    def contents(self):
        return {}

    def parallelize(self, mesh):
        pass

    def noise(self, n, generator):
        return torch.randn(n, 2, generator=generator)

    def sample_conditions(self, n, generator):
        return torch.zeros(n)

    def velocity(self, condition):
        return lambda x, t: self.model(x)

    def keep_reference(self):
        self.reference = copy.deepcopy(self.model)

    def velocity_and_reference(self, condition):
        return self.velocity(condition), lambda x, t: self.reference(x)

    def decode(self, x_0):
        return x_0

    def step_metrics(self, sample):
        return {}

    def reward(self, sample, condition):
        return sample.sum(1)

    def evaluate(self, folder, iteration):
        with torch.no_grad():
            x_0 = rollout(self.velocity(None), self.noise(8, torch.Generator()), self.times)[0]
        return {"reward": x_0.sum(1).mean().item(), "spread": x_0.std().item()}

    def draw_figures(self, folder):
        pass

    def save(self, folder):
        pass

    def load(self, folder):
        pass


@pytest.fixture
def task(monkeypatch):
    """The class of the task `mine`, to be spoiled."""
    spoiled = type("Mine", (), dict(vars(Mine)))
    monkeypatch.setattr(sys.modules[__name__], "Mine", spoiled)
    monkeypatch.setitem(trainer.TASKS, "mine", f"{__name__}:Mine")
    monkeypatch.setattr(trainer.report, "draw_curves", lambda *_: None)
    return spoiled


def line_of(program, *arguments):
    """The line with which a program ends."""
    with pytest.raises(SystemExit) as stop:
        program([str(argument) for argument in arguments])
    assert "\n" not in stop.value.code
    return stop.value.code


# A task


def test_a_task_with_the_protocols_members_trains(task, tmp_path):
    for beta in ("0", "1"):
        trainer.main(["--task", "mine", "--beta", beta, "--out", str(tmp_path / beta)])
        assert (tmp_path / beta / "result.json").exists()


MEMBERS = [*Task.__annotations__, *(name for name in vars(Task) if not name.startswith("_"))]


def test_the_smallest_task_has_exactly_the_protocols_members():
    members = {name for name in vars(Mine) if not name.startswith("_")}
    assert set(MEMBERS) == members | set(SET_BY_INIT) and len(MEMBERS) == 22


@pytest.mark.parametrize("member", [member for member in MEMBERS if member not in SET_BY_INIT])
def test_a_missing_member_of_a_task_is_named_before_the_task_is_built(member, task, tmp_path):
    delattr(task, member)
    task.__init__ = lambda *_: pytest.fail("the task is built")
    line = line_of(trainer.main, "--task", "mine", "--out", tmp_path / "run")
    assert line == f"error: task mine lacks {member}: see the class Task in runtime/task.py"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("member", SET_BY_INIT)
def test_a_member_that_init_does_not_set_is_named(member, task, tmp_path):
    build = task.__init__

    def build_without(self, options, T):
        build(self, options, T)
        delattr(type(self) if member == "device" else self, member)

    task.__init__ = build_without
    line = line_of(trainer.main, "--task", "mine", "--out", tmp_path)
    assert line == f"error: task mine lacks {member}: see the class Task in runtime/task.py"


@pytest.mark.parametrize("member", ["velocity", "decode"])
def test_a_member_without_gradient_is_named(member, task, tmp_path):
    spoiled = {
        "velocity": lambda self, condition: torch.no_grad()(lambda x, t: self.model(x)),
        "decode": torch.no_grad()(lambda self, x_0: 2 * x_0),
    }
    setattr(task, member, spoiled[member])
    line = line_of(trainer.main, "--task", "mine", "--out", tmp_path)
    assert line.startswith(f"error: task mine: {member} must give a tensor with gradient: look for no_grad")


def test_a_reward_of_a_task_that_is_no_tensor_is_refused(task, tmp_path):
    task.reward = lambda self, sample, condition: sample.sum(1).tolist()
    assert "must be a tensor (B,) = (4,)" in line_of(trainer.main, "--task", "mine", "--out", tmp_path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (None, "evaluate must return a dict of numbers, reward, spread among them"),
        ([0.5], "evaluate must return a dict of numbers, reward, spread among them"),
        ({"reward": torch.ones(()), "spread": 1.0}, "evaluate must return a dict of numbers"),
        ({"reward": "high", "spread": 1.0}, "evaluate must return a dict of numbers"),
        ({"spread": 1.0}, "evaluate returns no reward"),
        ({"reward": 1.0}, "evaluate returns no spread"),
        ({}, "evaluate returns no reward, spread"),
    ],
)
def test_an_evaluation_without_the_promised_numbers_is_refused(values, words, task, tmp_path):
    task.evaluate = lambda self, folder, iteration: values
    line = line_of(trainer.main, "--task", "mine", "--out", tmp_path)
    assert line.startswith(f"error: task mine: {words}")


# A reward


def a_list():
    return lambda images, prompts: images.mean((1, 2, 3)).tolist()


def without_gradient():
    return lambda images, prompts: images.detach().mean((1, 2, 3))


def raising():
    return lambda images, prompts: {}["x"]


def flux_run(models, out, *more):
    from tests.tiny_pipelines import flags

    return [*flags(models, "flux", "--out", out, *more)]


@pytest.mark.parametrize(
    ("name", "words"),
    [("a_list", "gave a value of type list for 2 images"), ("without_gradient", "gives no gradient to its images")],
)
def test_a_reward_that_cannot_train_is_refused_before_the_model_is_loaded(name, words, models, tmp_path, monkeypatch):
    from full_scale import pipeline

    monkeypatch.setattr(pipeline, "open_pipeline", lambda *_, **__: pytest.fail("the pipeline is opened"))
    reward = f"{__name__}:{name}"
    line = line_of(trainer.main, *flux_run(models, tmp_path, "--reward", reward, "--reward-weights"))
    assert line.startswith(f"error: your reward {reward} {words}")


def test_an_exception_in_a_reward_is_shown_below_a_line_that_names_it(models, tmp_path):
    reward = f"{__name__}:raising"
    with pytest.raises(SystemExit) as stop:
        trainer.main(flux_run(models, tmp_path, "--reward", reward, "--reward-weights"))
    first, *traceback = stop.value.code.split("\n")
    assert first == f"error: your reward {reward} raised KeyError: 'x'; its traceback:"
    assert 'return lambda images, prompts: {}["x"]' in "\n".join(traceback)


# Exceptions in a user's code


@pytest.mark.parametrize("error", [KeyError("x"), ImportError("x"), OSError("x"), AssertionError()])
def test_an_exception_of_user_code_becomes_a_user_code_error(error):
    with pytest.raises(UserCodeError, match="your reward") as caught, user_code("your reward"):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [BadInput("x"), torch.OutOfMemoryError("x"), StoppedBySignal(15, False)])
def test_an_error_that_has_a_line_of_its_own_passes_user_code(error):
    with pytest.raises(type(error)) as caught, user_code("your reward"):
        raise error
    assert caught.value is error


# Packages that are not installed


def errors_without(package, program):
    """What a program prints on stderr in a Python that lacks a package."""
    command = [sys.executable, "-c", f"import sys; sys.modules[{package!r}] = None\n{program}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("module", "package", "program"),
    [
        ("diffusers", "diffusers", "import train_leap_align as t; t.main(['--task', 'flux', '--help'])"),
        ("accelerate", "accelerate", "import train_leap_align as t; t.main(['--task', 'flux', '--help'])"),
        ("sklearn", "scikit-learn", "import train_leap_align as t; t.main(['--task', 'digits'])"),
        ("diffusers", "diffusers", "from full_scale import __main__ as t; t.main(['tiny', 'folder'])"),
        ("transformers", "transformers", "from full_scale import __main__ as t; t.main(['--help'])"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(module, package, program):
    if module == "accelerate":  # diffusers reports it by an error of its own
        pytest.importorskip("diffusers")
    assert errors_without(module, program) == f"error: {package} is not installed: pip install -r requirements.txt\n"


@pytest.mark.parametrize(
    ("module", "package", "reward"),
    [("open_clip", "open_clip_torch", "hpsv2.1"), ("transformers", "transformers", "imagereward")],
)
def test_a_missing_package_of_a_reward_is_named(module, package, reward, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    line = line_of(tools.main, "check-reward", reward, "--reward-weights", tmp_path)
    assert line == f"error: {package} is not installed: pip install -r requirements.txt"


def test_lora_without_peft_names_it(models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    line = line_of(trainer.main, *flux_run(models, tmp_path, "--lora-rank", "2"))
    assert line == "error: peft is not installed: pip install -r requirements.txt"
