"""The pages: what they name exists, commands parse, examples run."""

import importlib.util
import inspect
import json
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parameters_to_vector

import leap_align
import train_leap_align as trainer
from leap_align import Hyper
from runtime.command_line import check, choose
from runtime.files import read_csv

ROOT = Path(__file__).resolve().parent.parent
LAB, RESULTS, COST = (f"toy/laboratory/{name}.md" for name in ("README", "results/README", "cost"))
TOY, RUNTIME, FULL_SCALE = (f"{folder}/README.md" for folder in ("toy", "runtime", "full_scale"))
CLUSTER = "full_scale/cluster/README.md"
NAMES = ("README.md", TOY, LAB, RESULTS, COST, FULL_SCALE, CLUSTER, RUNTIME)
PAGES = {name: (ROOT / name).read_text() for name in NAMES}
README = PAGES["README.md"]
EQUATIONS = re.search(r"\| equation \|.*?\n\n", README, re.S).group().split("\n")[2:-2]
TESTS = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
BASH = [block.replace("\\\n", " ") for page in PAGES.values() for block in re.findall(r"```bash\n(.*?)```", page, re.S)]


def commands(program):
    """The arguments of every command that runs a program, without comments."""
    lines = [line for block in BASH for line in re.split(r"[;\n]|&&", block) if program in line]
    found = [line.split(program, 1)[1].split("#")[0].replace("$s", "0").split() for line in lines]
    return [list(command) for command in dict.fromkeys(map(tuple, found))]


EXTENSIONS = {"draft_k", "points"}
"""The method and the task that runtime/README.md adds; other tests run their commands."""
TRAINER = [command for command in commands("train_leap_align.py") if not EXTENSIONS & set(command)]
TOOLS = commands("-m full_scale")
MODULES = [command for command in commands("python -m ") if command[0] != "full_scale"]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_figure_and_test_that_a_page_names_exists_and_no_line_is_too_long(page):
    assert not [line for line in PAGES[page].splitlines() if len(line) > 120] and len(README.encode()) <= 16 * 1024
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGES[page]):
        path = ROOT / Path(page).parent / target
        assert target.startswith("http") or path.is_dir() or path.stat().st_size > 0
    for name in re.findall(r"`(test_\w+)`", PAGES[page]):
        assert f"def {name}(" in TESTS


def test_the_equation_table_has_every_method_of_the_paper_and_functions_that_exist_each_with_a_test():
    for row in EQUATIONS:
        functions, proofs = re.split(r"(?<!\\)\|", row)[2:4]
        assert all(callable(getattr(leap_align, name)) for name in re.findall(r"`(\w+)`", functions)), row
        assert "`test_" in proofs, row
    assert set(leap_align.METHODS) - {"full_backprop"} <= set(re.findall(r"`(\w+)`", "".join(EQUATIONS)))


@pytest.mark.parametrize("command", TRAINER, ids=" ".join)
def test_every_command_of_the_trainer_parses(command):
    if {"flux", "sd3", "klein"} & set(command):
        pytest.importorskip("diffusers")
    if "--help" not in command:
        flags = trainer.parse(command)
        check(flags.run, flags.method, choose("method", flags.run.method, trainer.METHODS), world_size=1)


@pytest.mark.parametrize("command", TOOLS, ids=" ".join)
def test_every_tool_and_its_flags_exist(command):
    pytest.importorskip("diffusers")
    from full_scale.__main__ import TOOLS
    from full_scale.plan import read_flags

    if command[0] == "plan":
        read_flags(command[1:])
    else:
        flags = {word[2:].replace("-", "_") for word in command if word.startswith("--")}
        assert flags <= set(inspect.signature(pkgutil.resolve_name(TOOLS[command[0]])).parameters)


@pytest.mark.parametrize("command", MODULES, ids=" ".join)
def test_every_module_and_experiment_exists(command):
    from toy.laboratory.__main__ import EXPERIMENTS

    assert importlib.util.find_spec(command[0])
    assert command[0] != "toy.laboratory" or command[1] in {*EXPERIMENTS, "all"}


def test_there_are_commands():
    assert len(TRAINER) >= 9 and len(TOOLS) >= 6 and len(MODULES) >= 8


SHORT = "--batch-size 16 --pretrain-steps 20 --reward-steps 20 --evaluation-samples 160".split()


def test_the_toys_command_installs_pinned_versions_and_all_that_it_needs(tmp_path):
    """The main job, with a checkpoint, where every other package of requirements.txt cannot be imported."""
    pinned, others, _ = (ROOT / "requirements.txt").read_text().split("\n\n")
    (command,) = re.findall(r"pip install (torch==.*?) &&", README.replace("\\\n", ""))
    assert command.split() == pinned.splitlines()[1:]
    names = [line.split("==")[0].removesuffix("_torch") for line in others.splitlines()[1:]]
    code = f"""
import sys
from pathlib import Path
sys.modules |= dict.fromkeys({names})
import train_leap_align
from toy import pretrain
pretrain.CACHE = Path({str(tmp_path)!r})
train_leap_align.main({[*SHORT, "--iterations", "1", "--out", str(tmp_path / "run")]})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "diffusers" in names and done.returncode == 0, done.stderr[-500:]
    assert (tmp_path / "run" / "result.json").exists()


def examples(page):
    return re.findall(r"```python\n(.*?)```", PAGES[page], re.S)


@pytest.mark.parametrize(("scale", "mean"), [(1, 0), (1, 5), (1, -5), (1e4, 0), (1e4, 1e3), (100, -1e3)])
def test_the_snippet_trains_with_a_reward_of_any_scale(scale, mean):
    """One step of at most the clipped length."""
    exec(examples("README.md")[0], names := {})
    model = torch.nn.Conv2d(16, 16, 1)
    model.forward = lambda x, t, prompt, forward=model.forward: forward(x)
    optimizer, before = torch.optim.SGD(model.parameters(), lr=1.0), parameters_to_vector(model.parameters())

    def reward(x_0, prompt):
        return mean + scale * x_0.flatten(1).mean(1)

    names["update"](model, reward, ["a", "b"], optimizer, torch.Generator().manual_seed(0))
    assert 1e-3 < (parameters_to_vector(model.parameters()) - before).norm() < 1.001


RIGHT = examples(RUNTIME)[-1]  # the velocity of a model whose t = 0 is noise
WRONG = [RIGHT.replace(*change) for change in [("-model", "model"), ("-model(x, 1 - t)", "model(x, t)")]]


class Network(nn.Module):
    """A velocity (B, 2) at a time, () or (B,)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x, t):
        return self.body(torch.cat([x, t.reshape(-1, 1).expand(len(x), 1)], 1))


@pytest.mark.parametrize("wrapper", [RIGHT, *WRONG])
def test_a_model_of_flow_matching_needs_the_minus_sign(wrapper):
    """Two Gaussians, aligned to the one on the right, and drawn by the library's own solver before and after."""
    path, solver = (pytest.importorskip(f"flow_matching.{name}") for name in ("path", "solver"))
    generator, target, is_right = torch.Generator().manual_seed(0), torch.tensor([2.0, 0.0]), wrapper == RIGHT
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def draw(noise):
        return solver.ODESolver(velocity_model=model).sample(x_init=noise, step_size=0.04)

    def reward(x):
        return -(x - target).square().sum(1)

    def update():
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(300):
        side = 2 * torch.randint(2, (256, 1), generator=generator) - 1
        noise, spread = torch.randn(2, 256, 2, generator=generator)
        t = torch.rand(256, generator=generator)
        batch = path.CondOTProbPath().sample(x_0=noise, x_1=side * target + 0.3 * spread, t=t)
        (model(batch.x_t, batch.t) - batch.dx_t).square().mean().backward()
        update()
    exec(wrapper, names := {"model": model})
    times, x_T, velocity = leap_align.uniform_times(25), torch.randn(256, 2, generator=generator), names["velocity"]
    before, own = draw(x_T), leap_align.rollout(velocity, x_T, times)[0]
    assert torch.allclose(own, before, atol=1e-4) == is_right
    for _ in range(60):
        noise = torch.randn(64, 2, generator=generator)
        for x_0, weight, _ in leap_align.leap_align(velocity, noise, times, Hyper(lam=None), generator):
            leap_align.objective(leap_align.checked(reward(x_0), x_0), weight, None).backward()
        update()
    rise = reward(leap_align.rollout(velocity, x_T, times)[0]).mean() - reward(own).mean()
    rise_in_library = reward(draw(x_T)).mean() - reward(before).mean()
    assert rise > 4 and (rise_in_library > 4 if is_right else rise_in_library < -4), (rise, rise_in_library)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the trainer and the toys with the method, its column and the task of runtime/README.md."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("leap_align.py", "beyond.py", "train_leap_align.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("runtime", "toy"):
        shutil.copytree(ROOT / name, folder / name)
    field, method, entry, task, _ = examples(RUNTIME)
    task_entry = re.search(r'`("points": "my_task:Points")`', PAGES[RUNTIME]).group(1)
    for path, mark, text, end in (
        (folder / "leap_align.py", "\n    def __post_init__(self)", field, f"\n\n{method}\n\n{entry}"),
        (folder / "train_leap_align.py", '    "digits": ', f"    {task_entry},\n", ""),
        (folder / "train_leap_align.py", ' skipped".split()', " path", ""),
    ):
        before, mark, after = path.read_text().rpartition(mark)
        path.write_text(before + text + mark + after + end)
    (folder / "my_task.py").write_text(task)
    return folder


def run_extended(folder, name, *flags, processes=1):
    """Runs the page's command with more flags; returns the run's folder, its rows and its evaluations."""
    (command,) = (command for command in commands("train_leap_align.py") if name in command)
    out = folder / "runs" / f"{name}-{processes}-{len(flags)}"
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    arguments = [*torchrun, "train_leap_align.py", *command[: command.index("--out")], "--out", out, *flags]
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out, read_csv(out / "metrics.csv"), json.loads((out / "result.json").read_text())


def test_the_example_of_a_method_and_a_hyperparameter_trains(extended):
    out, rows, _ = run_extended(extended, "draft_k", "--iterations", "2", *SHORT)
    assert json.loads((out / "config.json").read_text())["last"] == 5
    assert all(float(row["grad_norm"]) > 0 and float(row["path"]) > 0 for row in rows)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_example_of_a_task_trains_on_one_process_and_on_two(extended, processes):
    runs = [run_extended(extended, "points", "--iterations", "40", processes=n) for n in sorted({1, processes})]
    (one, rows, result), (two, other_rows, _) = runs[0], runs[-1]
    assert result["before"]["right"] > 0.9 and result["after"]["error"] < result["before"]["error"] / 2
    for a, b in zip(rows, other_rows, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=1e-4)
        assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-3)
    weights = [load_file(run / "model" / "weights.safetensors") for run in (one, two)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-3)


def test_the_example_of_a_reward_keeps_the_contract():
    from full_scale.rewards import CustomReward, check_reward

    exec(examples(FULL_SCALE)[0], names := {})
    check_reward(CustomReward(names["colourful"]()))
