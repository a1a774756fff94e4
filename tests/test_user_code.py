"""Code that a user adds, and packages that a user has not installed: a failure names them in one line."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import train_leap_align as trainer
from full_scale import __main__ as tools
from leap_align import BadInput, uniform_times
from runtime.exit import exit_process, user_code
from runtime.processes import StoppedBySignal, UserCodeError
from runtime.task import Task
from tests.tiny_rewards import refusal
from tests.toy_runs import ROOT

MINE = {
    "held_out": {"spread": -0.1},
    "__init__": lambda self, options, T: vars(self).update(model=nn.Linear(2, 2), times=uniform_times(T)),
    "noise": lambda self, n, generator: torch.randn(n, 2, generator=generator),
    "sample_conditions": lambda self, n, generator: torch.zeros(n),
    "velocity_of": lambda self, model, inputs: lambda x, t: model(x),
    "reward": lambda self, sample, condition: sample.sum(1),
    "evaluate_held_out": lambda self, samples, condition: {"spread": samples.std().item()},
}
"""The members of the smallest task: the reward is high where both coordinates of a sample are."""


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains the task `mine` with some members changed, or left out if they are None."""

    def train(*flags, **changed):
        members = {name: member for name, member in {**MINE, **changed}.items() if member is not None}
        monkeypatch.setattr(sys.modules[__name__], "Changed", type("Changed", (Task,), members), raising=False)
        sizes = "--T 4 --iterations 1 --batch-size 4".split()
        trainer.main(["--task", "mine", "--out", str(tmp_path / "run"), *sizes, *flags])

    monkeypatch.setitem(trainer.TASKS, "mine", f"{__name__}:Changed")
    monkeypatch.setattr(trainer.report, "draw_curves", lambda *_: None)
    return train


def test_a_task_with_the_required_members_trains_on_a_leash(train, tmp_path):
    train("--beta", "1")
    assert (tmp_path / "run" / "result.json").exists()


def test_the_models_and_the_noise_of_an_evaluation_move_to_the_device_of_a_task():
    found, zero = [], lambda self, sample, condition: torch.zeros(len(sample))
    held_out = lambda self, samples, condition: found.append(samples.is_meta) or {}  # noqa: E731
    members = {**MINE, "device": torch.device("meta"), "reward": zero, "evaluate_held_out": held_out}
    task = type("OnMeta", (Task,), members)(None, 2)
    task.keep_reference()
    task.parallelize(None)
    task.evaluate(None, 0)
    assert found == [True] and all(p.is_meta for m in (task.model, task.reference) for p in m.parameters())


@pytest.mark.parametrize("member", sorted(Task.__abstractmethods__))
def test_a_missing_member_of_a_task_is_named_before_the_task_is_built(member, train, tmp_path):
    members = {member: None, "__init__": lambda *_: pytest.fail("the task is built")}
    line = refusal(lambda: train(**members), error=SystemExit)
    assert line == f"error: task mine lacks {member}: see the class Task in runtime/task.py"
    assert not (tmp_path / "run").exists()


def test_a_task_that_is_no_task_is_refused(monkeypatch):
    monkeypatch.setitem(trainer.TASKS, "mine", f"{__name__}:ROOT")
    line = refusal(trainer.main, ["--task", "mine"], error=SystemExit)
    assert line.startswith("error: task mine: ") and line.endswith(" must inherit from Task in runtime/task.py")


NO_GRADIENT = "must give a tensor with gradient: look for no_grad"
NO_NUMBERS = "evaluate must return a dict of numbers, reward, spread among them"


@pytest.mark.parametrize(
    ("member", "value", "words"),
    [
        ("__init__", lambda self, *_: setattr(self, "times", uniform_times(4)), "task mine lacks model: see the class"),
        ("__init__", lambda self, *_: setattr(self, "model", nn.Linear(2, 2)), "task mine lacks times: see the class"),
        ("velocity_of", lambda self, model, inputs: lambda x, t: model(x).detach(), f"velocity {NO_GRADIENT}"),
        ("velocity_of", lambda self, model, inputs: lambda x, t: (model(x),), "the velocity gave a tuple: return its"),
        ("decode", lambda self, x_0: 2 * x_0.detach(), f"task mine: decode {NO_GRADIENT}"),
        ("reward", lambda self, sample, _: sample.sum(1).tolist(), "a reward of type list must be a tensor (B,)"),
        ("evaluate", lambda *_: None, NO_NUMBERS),
        ("evaluate", lambda *_: {"reward": torch.ones(()), "spread": 1.0}, NO_NUMBERS),
        ("evaluate", lambda *_: {}, "evaluate returns no reward, spread:"),
        ("evaluate_held_out", lambda *_: {}, "evaluate returns no spread:"),
        ("step_metrics", lambda *_: {"r": 1.0}, "step_metrics gave ['r'], but step_metric_names are []"),
        ("parallelize", lambda self, mesh: self.model.bfloat16(), "must exist and be float32"),
    ],
)
def test_a_member_that_does_something_else_is_named(member, value, words, train):
    line = refusal(lambda: train(**{member: value}), error=SystemExit)
    assert line.startswith("error: ") and words in line


def test_a_model_that_is_not_sharded_is_refused_on_several_processes(train, monkeypatch):
    monkeypatch.setattr("runtime.task.world_size", lambda: 2)
    line = refusal(train, error=SystemExit)
    assert "not sharded: its parallelize(mesh) must call fully_shard" in line


def flux_run(models, out, *more):
    from tests.tiny_pipelines import flags

    return [*flags(models, "flux", "--out", out, *more)]


def test_a_reward_that_cannot_train_is_refused_before_the_model_is_loaded(models, tmp_path, monkeypatch):
    from full_scale import pipeline

    monkeypatch.setattr(pipeline, "open_pipeline", lambda *_, **__: pytest.fail("the pipeline is opened"))
    reward = "tests.test_rewards:without_gradient"
    command = flux_run(models, tmp_path, "--reward", f"tests.test_rewards:redness,{reward}", "--reward-weights")
    line = refusal(trainer.main, command, error=SystemExit)
    assert line.startswith(f"error: your reward {reward} gives no gradient to its images")


def test_an_exception_in_a_reward_is_shown_below_a_line_that_names_it(models, tmp_path):
    reward = "tests.test_rewards:raising"
    training = flux_run(models, tmp_path, "--reward", reward, "--reward-weights")
    for program, command in ((tools.main, ["check-reward", reward]), (trainer.main, training)):
        with pytest.raises(SystemExit) as stop:
            program(command)
        first, *traceback = stop.value.code.split("\n")
        assert first == f"error: your reward {reward} raised KeyError: 'x'; its traceback:"
        assert traceback[0].startswith("Traceback") and 'returns(lambda images: {}["x"])' in "\n".join(traceback)


FORGED = "x\x1b[2K\rerror: fine\nerror: \u202e\x9b\udcff"
"""A text that clears its line on a terminal and writes others."""


@pytest.mark.parametrize("error", [BadInput(FORGED), OSError(5, "x", FORGED), UserCodeError(FORGED)])
def test_no_message_steers_the_terminal_or_forges_a_line(error):
    if isinstance(error, UserCodeError):
        error.__cause__ = ValueError(FORGED)
    with pytest.raises(SystemExit) as stop:
        exit_process(error, "", "")
    first, *traceback = stop.value.code.split("\n")
    assert r"x\x1b[2K\rerror: fine\n" in first and all(line.isprintable() for line in (first, *traceback))
    assert bool(traceback) == isinstance(error, UserCodeError)


OWN_LINE = [BadInput("x"), torch.OutOfMemoryError("x"), StoppedBySignal(15, False)]


@pytest.mark.parametrize("error", [KeyError("x"), ImportError("x"), OSError("x"), SystemExit(1), *OWN_LINE])
def test_an_exception_of_user_code_becomes_a_user_code_error_unless_it_has_a_line_of_its_own(error):
    with pytest.raises(BaseException) as caught, user_code("your reward"):
        raise error
    found = caught.value
    wrapped = isinstance(found, UserCodeError) and str(found) == "your reward" and found.__cause__ is error
    assert found is error if error in OWN_LINE else wrapped


MODEL = "--model full_scale/shapes/trained --prompts full_scale/shapes/trained/prompts.txt --out {out}"
SLOWLY_MISSED = [
    ("sklearn", "scikit-learn", "train_leap_align", "--task digits"),
    ("open_clip", "open_clip_torch", "full_scale.__main__", "check-reward hpsv2.1 --reward-weights tests"),
    ("accelerate", "accelerate", "full_scale.__main__", f"sample {MODEL}"),  # diffusers has an error of its own
    ("transformers", "transformers", "full_scale.__main__", "plan"),
    ("transformers", "transformers", "full_scale.__main__", "check-reward imagereward --reward-weights tests"),
]


@pytest.mark.parametrize(
    ("module", "package", "program", "arguments"),
    [
        ("diffusers", "diffusers", "train_leap_align", f"--task flux {MODEL}"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOWLY_MISSED),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, module, package, program, arguments):
    pytest.importorskip("diffusers")
    words = arguments.format(out=tmp_path / "out").split()
    script = f"import sys; sys.modules[{module!r}] = None\nimport {program} as t; t.main({words})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last_line = done.stderr.splitlines()[-1]  # libraries may warn before it
    assert last_line == f"error: {package} is not installed: pip install -r requirements.txt"


def test_lora_without_peft_names_it(models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    line = refusal(trainer.main, flux_run(models, tmp_path, "--lora-rank", "2"), error=SystemExit)
    assert line == "error: peft is not installed: pip install -r requirements.txt"
