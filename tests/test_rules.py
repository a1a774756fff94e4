"""The rules of the project, read from the sources: what each room may import, and what no file may do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import beyond
import leap_align

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {"leap_align.py", "beyond.py", "train_leap_align.py", "flux_adapter.py", "runtime", "full_scale", "toy"}
TOP_LEVEL |= {"tests", "requirements.txt", "README.md"}
PATTERNS = ("*.py", "runtime/**/*.py", "full_scale/**/*.py", "toy/**/*.py")
FILES = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in FILES}
TASKS = {"toy", "digits", "flux", "sd3", "klein"}
METHODS = leap_align.METHODS | beyond.METHODS
EQUATIONS = ("leap_align.py", "beyond.py")
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


def imports(tree):
    """The dotted names of everything that is imported, inside functions as well."""
    modules = {alias.name for node in nodes(tree, ast.Import) for alias in node.names}
    for node in nodes(tree, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        modules |= {f"{module}.{alias.name}" for alias in node.names}
    return modules


# Which room may import which: arrows point downwards only
ROOMS = ("leap_align", "beyond", "train_leap_align", "flux_adapter", "runtime", "full_scale", "toy", "tests")
MAY_IMPORT = {
    "leap_align.py": set(),
    "beyond.py": {"leap_align"},
    "runtime/": {"leap_align", "runtime"},
    "full_scale/": {"leap_align", "runtime", "full_scale"},
    "full_scale/benchmark.py": {"leap_align", "beyond", "runtime", "full_scale", "flux_adapter", "train_leap_align"},
    "full_scale/plan.py": {"leap_align", "beyond", "runtime", "full_scale", "train_leap_align"},
    "toy/": {"leap_align", "runtime", "toy"},
    "toy/laboratory/": {"leap_align", "beyond", "runtime", "toy", "train_leap_align"},
    "flux_adapter.py": {"leap_align", "runtime", "full_scale"},
    "train_leap_align.py": {"leap_align", "beyond", "runtime"},
}
"""The laboratory, the plan and the benchmark start the trainer, so they stand above it."""


def forbidden_imports(path, tree):
    """What a file imports although its room may not: the project's modules, those of a higher room, relative ones."""
    room = max((prefix for prefix in MAY_IMPORT if path.startswith(prefix)), key=len)
    higher = ("toy.laboratory", ".") if room == "toy/" else (".",)  # relative: a module with two names is loaded twice
    foreign = set(ROOMS) - MAY_IMPORT[room]
    return {name for name in imports(tree) if name.split(".")[0] in foreign or name.startswith(higher)}


@every_file
def test_imports_point_downwards(path):
    assert not forbidden_imports(path, TREES[path])


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("runtime/ema.py", "def f():\n    import full_scale.rewards"),
        ("toy/task.py", "import train_leap_align as trainer"),
        ("toy/modes.py", "from toy.laboratory import compare"),
        ("runtime/ema.py", "from . import processes"),
    ],
)
def test_an_upward_import_is_found(path, line):
    assert forbidden_imports(path, ast.parse(line))


# Rule 1: leap_align.py and beyond.py
DTYPES = {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)} | {"type", "type_as"}
DEVICES = {"cpu", "cuda", "mps", "xpu", "meta"}
DRAWS = {"rand", "randn", "randint", "randperm", "normal", "multinomial", "bernoulli", "poisson"}
DRAWS |= {f"{name}_" for name in DRAWS}
GLOBAL = {"random", "rand_like", "randn_like", "randint_like", "manual_seed", "seed", "default_generator"}


@pytest.mark.parametrize("path", EQUATIONS)
def test_equations_compute_and_draw_from_a_generator_and_do_nothing_else(path):
    tree = TREES[path]
    allowed = {"torch", *sys.stdlib_module_names, *MAY_IMPORT[path]} - {"random"}
    assert {module.split(".")[0] for module in imports(tree)} <= allowed
    assert not names(tree) & {"print", "open", "input", "argparse", "sys", "os", "pathlib", "logging"}
    assert not {text.split(":")[0] for text in strings(tree)} & (DEVICES | TASKS)
    assert not names(tree) & (DEVICES - {"meta"} | GLOBAL | {"set_default_device"})
    assert not [ast.unparse(node) for node in nodes(tree, ast.Attribute) if node.attr in DTYPES]
    moves = [call for call in nodes(tree, ast.Call) if name_of(call) == "to"]
    assert not [call for call in moves for part in (*call.args, *call.keywords) if "dtype" in ast.unparse(part)]
    draws = [call for call in nodes(tree, ast.Call) if name_of(call) in DRAWS]
    assert draws and all("generator" in {keyword.arg for keyword in call.keywords} for call in draws)


@pytest.mark.parametrize(("path", "most"), [("leap_align.py", 400), ("beyond.py", 360), ("train_leap_align.py", 350)])
def test_a_file_that_one_reads_in_a_sitting_stays_short(path, most):
    assert len((ROOT / path).read_text().splitlines()) <= most


# Rule 2: where the gradient stops, and which names a file may know
TRAINED = {"velocity", "velocity_of", "velocity_and_reference", "decode", "reward"}
"""What of a task is on the way of the gradient."""


@every_file
def test_gradients_stop_in_the_equations_and_their_backward_alone(path):
    """Evaluation and frozen models aside; the laboratory's variants are methods."""
    if path in (*EQUATIONS, "runtime/backward.py"):
        return
    assert not names(TREES[path]) & {"detach", "detach_"}
    assert path == "toy/laboratory/variants.py" or "stop_gradient" not in names(TREES[path])
    functions = [node for node in nodes(TREES[path], ast.FunctionDef) if node.name in TRAINED]
    for tree in (TREES[path],) if path in ("train_leap_align.py", "flux_adapter.py") else functions:
        assert not names(tree) & {"no_grad", "set_grad_enabled", "inference_mode"}


@pytest.mark.parametrize("path", [path for path in TREES if path.startswith(("flux_adapter", "full_scale/", "toy/"))])
def test_tasks_name_no_method(path):
    assert path.startswith("toy/laboratory/") or not strings(TREES[path]) & set(METHODS)


# Rule 3: tables and no branches; rule 4: tensors of inference mode cannot be saved for backward
@every_file
def test_no_branch_over_the_method_and_no_inference_mode(path):
    for node in nodes(TREES[path], ast.Compare):
        sides = [node.left, *node.comparators]
        others = [side for side in sides if name_of(side) != "method"]
        assert len(others) == len(sides) or not any(map(strings, others)), ast.unparse(node)
    assert "method" not in [name_of(node.subject) for node in nodes(TREES[path], ast.Match)]
    assert not names(TREES[path]) & {"inference_mode"}


LARGE = "diffusers transformers open_clip hpsv2 peft torchvision huggingface_hub tokenizers accelerate".split()


@pytest.mark.parametrize("modules", ["leap_align", "train_leap_align, toy.modes, toy.digits"])
def test_importing_these_needs_no_large_library(modules):
    script = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & {*LARGE, "tensorboard", "wandb", "runtime.tracker"}


def test_help_and_the_list_of_tools_need_no_large_library():
    """Neither does importing the rewards, which `python -m full_scale --help` does."""
    script = f"""
import sys
sys.modules |= dict.fromkeys({[*LARGE, "psutil"]})  # importing one raises ModuleNotFoundError
import train_leap_align
from full_scale.__main__ import TOOLS, main
from full_scale.models import FAMILIES
programs = [(main, []), *((train_leap_align.main, ["--task", task]) for task in FAMILIES)]
programs += [(main, [name]) for name in TOOLS] + [(main, ["plan", "--task", task]) for task in FAMILIES]
for program, words in programs:
    try:
        program([*words, "--help"])
    except SystemExit as stop:
        print("status", *words, stop.code)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    statuses = [line.split() for line in done.stdout.splitlines() if line.startswith("status ")]
    assert done.returncode == 0 and len(statuses) >= 17, done.stderr
    assert [row for row in statuses if row[-1] != "0"] == []


# The layout
def test_the_top_level_holds_what_the_design_lists():
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a repository")
    top = {line.split("/")[0] for line in listed.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL
