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
TASKS = {"toy", "digits", "flux", "sd3", "klein"}
PATTERNS = ("*.py", "runtime/**/*.py", "full_scale/**/*.py", "toy/**/*.py")
FILES = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in FILES}
TASK_FILES = ["flux_adapter.py", "full_scale/task.py", "toy/digits.py", "toy/modes.py", "toy/task.py"]

METHODS = leap_align.METHODS | beyond.METHODS
LEAP_ALIGN = TREES["leap_align.py"]
every_equation = pytest.mark.parametrize("tree", [LEAP_ALIGN, TREES["beyond.py"]], ids=["leap_align", "beyond"])
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
    "full_scale/plan.py": {"leap_align", "runtime", "full_scale", "train_leap_align"},
    "toy/": {"leap_align", "runtime", "toy"},
    "toy/laboratory/": {"leap_align", "beyond", "runtime", "toy", "train_leap_align"},
    "flux_adapter.py": {"leap_align", "runtime", "full_scale"},
    "train_leap_align.py": {"leap_align", "beyond", "runtime"},
}
"""The laboratory, the plan and the benchmark start the trainer, so they stand above it."""


def forbidden_imports(path, tree):
    """The project's modules that a file imports although its room may not."""
    room = max((prefix for prefix in MAY_IMPORT if path.startswith(prefix)), key=len)
    return {name for name in imports(tree) if name.split(".")[0] in set(ROOMS) - MAY_IMPORT[room]}


@every_file
def test_imports_point_downwards(path):
    assert not forbidden_imports(path, TREES[path])


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("flux_adapter.py", "from train_leap_align import main"),
        ("runtime/ema.py", "def f():\n    import full_scale.rewards"),
        ("toy/task.py", "import train_leap_align as trainer"),
        ("toy/laboratory/compare.py", "from full_scale import tiny"),
        ("full_scale/tiny.py", "from toy import nets"),
    ],
)
def test_an_upward_import_is_found(path, line):
    assert forbidden_imports(path, ast.parse(line))


@every_file
def test_no_import_is_relative(path):
    """A module that is imported under two names is loaded twice."""
    assert not any(node.level for node in nodes(TREES[path], ast.ImportFrom))


def test_the_tasks_do_not_need_the_laboratory():
    for path, tree in TREES.items():
        if Path(path).parent == Path("toy"):
            assert not [name for name in imports(tree) if name.startswith("toy.laboratory")], path


# Rule 1: leap_align.py and beyond.py


@every_equation
def test_equations_import_torch_and_the_standard_library_alone(tree):
    allowed = {"torch", *sys.stdlib_module_names} - {"random"}
    own = set() if tree is LEAP_ALIGN else {"leap_align"}
    assert {module.split(".")[0] for module in imports(tree)} <= allowed | own


@every_equation
def test_equations_print_and_read_nothing(tree):
    assert not names(tree) & {"print", "open", "input", "argparse", "sys", "os", "pathlib", "logging"}


@every_equation
def test_equations_name_no_device(tree):
    assert not {text.split(":")[0] for text in strings(tree)} & {"cpu", "cuda", "mps", "xpu", "meta"}
    assert not names(tree) & {"cpu", "cuda", "mps", "xpu", "set_default_device"}


@every_equation
def test_equations_cast_no_dtype(tree):
    dtypes = {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}
    used = [node for node in nodes(tree, ast.Attribute) if node.attr in dtypes | {"type", "type_as"}]
    assert not [ast.unparse(node) for node in used]
    moves = [call for call in nodes(tree, ast.Call) if name_of(call) == "to"]
    assert not [ast.unparse(call) for call in moves if "dtype" in ast.unparse(call)]


RANDOM = {"rand", "randn", "randint", "randperm", "normal", "multinomial", "bernoulli", "poisson"}
GLOBAL = {"random", "rand_like", "randn_like", "randint_like", "manual_seed", "seed", "default_generator"}


def draws(tree):
    return [call for call in nodes(tree, ast.Call) if name_of(call) in RANDOM | {f"{n}_" for n in RANDOM}]


@every_equation
def test_equations_draw_from_a_generator_alone(tree):
    assert draws(LEAP_ALIGN)
    keywords = [{keyword.arg for keyword in call.keywords} for call in draws(tree)]
    assert all("generator" in names_of_a_call for names_of_a_call in keywords)
    assert not names(tree) & GLOBAL


# Rule 2: where the gradient stops, and which names a file may know


@every_file
def test_only_leap_align_and_beyond_stop_gradients(path):
    assert path in ("leap_align.py", "beyond.py") or not names(TREES[path]) & {"detach", "detach_"}


@pytest.mark.parametrize("path", TASK_FILES)
def test_tasks_name_no_method(path):
    assert not strings(TREES[path]) & set(METHODS)


@every_equation
def test_equations_name_no_task(tree):
    assert not strings(tree) & TASKS


# Rule 3: tables and no branches


@every_file
def test_no_branch_over_the_method(path):
    for node in nodes(TREES[path], ast.Compare):
        sides = [node.left, *node.comparators]
        others = [side for side in sides if name_of(side) != "method"]
        assert len(others) == len(sides) or not any(map(strings, others)), ast.unparse(node)
    assert "method" not in [name_of(node.subject) for node in nodes(TREES[path], ast.Match)]


@pytest.mark.parametrize("modules", ["leap_align", "train_leap_align, toy.modes, toy.digits", "full_scale.rewards"])
def test_importing_these_needs_no_large_library(modules):
    script = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    large = "diffusers transformers open_clip hpsv2 peft torchvision huggingface_hub".split()
    assert not set(done.stdout.split()) & set(large)


# Rule 4: tensors made in inference mode cannot be saved for backward


@every_file
def test_no_file_uses_inference_mode(path):
    assert not names(TREES[path]) & {"inference_mode"}


# The layout


def test_the_top_level_holds_what_the_design_lists():
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a repository")
    top = {line.split("/")[0] for line in listed.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL
