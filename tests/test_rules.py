"""The rules of the house, read from the sources: what each file may know of the others, and what none may do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from leap_align import METHODS

ROOT = Path(__file__).parents[1]
TOP = {"leap_align.py", "train_leap_align.py", "flux_adapter.py", "rewards.py"}
TOP |= {"toy", "tests", "requirements.txt", "README.md"}
TASKS = {"toy", "digits", "flux", "sd3"}


def parsed(path):
    file = ROOT / path
    return ast.parse(file.read_text()) if file.exists() else None


FILES = ["leap_align.py", "train_leap_align.py", "flux_adapter.py", "rewards.py"]
FILES += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("toy/*.py"))
TREES = {path: tree for path in FILES if (tree := parsed(path))}
TASK_FILES = [p for p in TREES if p in ("toy/task.py", "toy/modes.py", "toy/digits.py", "flux_adapter.py")]

LEAP_ALIGN = TREES["leap_align.py"]
every_file = pytest.mark.parametrize("path", TREES)


def nodes(tree, kind):
    return [node for node in ast.walk(tree) if isinstance(node, kind)]


def strings(tree):
    return {node.value for node in nodes(tree, ast.Constant) if isinstance(node.value, str)}


def name_of(node):
    """x of x, of a.x, of x() and of a["x"]."""
    node = node.func if isinstance(node, ast.Call) else node
    if isinstance(node, ast.Subscript):
        return node.slice.value if isinstance(node.slice, ast.Constant) else None
    return getattr(node, "attr", None) or getattr(node, "id", None)


def names(tree):
    """Every name that is read, called or imported."""
    imported = {alias.name for node in nodes(tree, ast.Import | ast.ImportFrom) for alias in node.names}
    return {name_of(node) for node in nodes(tree, ast.Name | ast.Attribute)} | imported


# Rule 1: leap_align.py


def test_leap_align_imports_torch_and_the_standard_library_alone():
    modules = {alias.name for node in nodes(LEAP_ALIGN, ast.Import) for alias in node.names}
    modules |= {"." * node.level + (node.module or "") for node in nodes(LEAP_ALIGN, ast.ImportFrom)}
    assert {module.split(".")[0] for module in modules} <= {"torch", *sys.stdlib_module_names} - {"random"}


def test_leap_align_prints_and_reads_nothing():
    assert not names(LEAP_ALIGN) & {"print", "open", "input", "argparse", "sys", "os", "pathlib", "logging"}


def test_leap_align_names_no_device():
    assert not {text.split(":")[0] for text in strings(LEAP_ALIGN)} & {"cpu", "cuda", "mps", "xpu", "meta"}
    assert not names(LEAP_ALIGN) & {"cpu", "cuda", "mps", "xpu", "set_default_device"}


def test_leap_align_casts_no_dtype():
    dtypes = {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}
    used = [node for node in nodes(LEAP_ALIGN, ast.Attribute) if node.attr in dtypes | {"type", "type_as"}]
    assert not [ast.unparse(node) for node in used]
    moves = [call for call in nodes(LEAP_ALIGN, ast.Call) if name_of(call) == "to"]
    assert not [ast.unparse(call) for call in moves if "dtype" in ast.unparse(call)]


RANDOM = {"rand", "randn", "randint", "randperm", "normal", "multinomial", "bernoulli", "poisson"}
GLOBAL = {"random", "rand_like", "randn_like", "randint_like", "manual_seed", "seed", "default_generator"}


def test_leap_align_draws_from_a_generator_alone():
    draws = [call for call in nodes(LEAP_ALIGN, ast.Call) if name_of(call) in RANDOM | {f"{n}_" for n in RANDOM}]
    assert draws and not [
        ast.unparse(call) for call in draws if "generator" not in {keyword.arg for keyword in call.keywords}
    ]
    assert not names(LEAP_ALIGN) & GLOBAL


# Rule 2: where the gradient stops, and who knows whom


@every_file
def test_gradient_is_cut_in_leap_align_alone(path):
    assert path == "leap_align.py" or not names(TREES[path]) & {"detach", "detach_"}


@pytest.mark.parametrize("path", TASK_FILES)
def test_tasks_name_no_method(path):
    assert not strings(TREES[path]) & set(METHODS)


def test_leap_align_names_no_task():
    assert not strings(LEAP_ALIGN) & TASKS


# Rule 3: tables and no branches


@every_file
def test_no_branch_over_the_method(path):
    for node in nodes(TREES[path], ast.Compare):
        sides = [node.left, *node.comparators]
        others = [side for side in sides if name_of(side) != "method"]
        assert len(others) == len(sides) or not any(map(strings, others)), ast.unparse(node)
    assert "method" not in [name_of(node.subject) for node in nodes(TREES[path], ast.Match)]


@pytest.mark.parametrize("modules", ["leap_align", "train_leap_align, toy.modes, toy.digits"])
def test_importing_it_needs_no_large_library(modules):
    script = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & {"diffusers", "transformers", "open_clip", "hpsv2", "peft", "torchvision"}


# Rule 4: tensors of inference mode cannot be saved for backward


@every_file
def test_nobody_uses_inference_mode(path):
    assert not names(TREES[path]) & {"inference_mode"}


# The layout


def test_the_top_level_holds_what_the_design_lists():
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a repository")
    top = {line.split("/")[0] for line in listed.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP
