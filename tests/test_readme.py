"""The README files: what they name exists, snippets run, commands parse, numbers are the committed ones."""

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

import leap_align
import train_leap_align as trainer
from runtime.run_dir import read_csv

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("", "toy/", "toy/laboratory/", "toy/laboratory/results/", "full_scale/", "runtime/")
NAMES = (*(f"{folder}README.md" for folder in FOLDERS), "toy/laboratory/cost.md")
PAGES = {name: (ROOT / name).read_text() for name in NAMES}
README = PAGES["README.md"]
TABLE = re.search(r"\| equation \|.*?\n\n", README, re.S).group().splitlines()[2:]
LINES = [
    line.strip()
    for page in PAGES.values()
    for block in re.findall(r"```bash\n(.*?)```", page, re.S)
    for line in re.split(r"[;\n]|&&", block.replace("\\\n", " "))
]


def commands(program):
    """The arguments of every command that runs a program, without comments."""
    lines = [line.split(program, 1)[1].split("#")[0].split() for line in LINES if program in line]
    return [[word.replace("$s", "0") for word in line] for line in {tuple(line): line for line in lines}.values()]


EXTENSIONS = {"draft_k", "points"}
"""The method and the task that runtime/README.md adds; other tests run their commands."""
TRAINER = [command for command in commands("train_leap_align.py") if not EXTENSIONS & set(command)]
TOOLS = commands("-m full_scale")
MODULES = [line for line in commands("python -m ") if line[0] != "full_scale"]
every_page = pytest.mark.parametrize("page", PAGES)


# Form


def test_the_readme_has_at_most_16_kilobytes():
    assert len(README.encode()) <= 16 * 1024


@every_page
def test_no_line_is_longer_than_120_characters(page):
    assert not [line for line in PAGES[page].splitlines() if len(line) > 120]


@every_page
def test_every_link_and_figure_exists(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGES[page]):
        if not target.startswith("http"):
            path = ROOT / Path(page).parent / target
            assert path.is_dir() or path.stat().st_size > 0


# The equation table


@pytest.mark.parametrize("row", [row for row in TABLE if row], ids=lambda row: row.split("|")[1].strip())
def test_every_function_and_test_of_the_equation_table_exists(row):
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    _, _, functions, proofs, _ = re.split(r"(?<!\\)\|", row)
    for name in re.findall(r"`(\w+)`", functions):
        assert callable(getattr(leap_align, name))
    for name in (names := re.findall(r"`(\w+)`", proofs)):
        assert f"def {name}(" in tests
    assert names


def test_every_method_of_the_paper_is_in_the_table():
    names = set(re.findall(r"`(\w+)`", "".join(TABLE)))
    assert set(leap_align.METHODS) - {"full_backprop"} <= names


@every_page
def test_every_test_that_a_page_names_exists(page):
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", PAGES[page]):
        assert f"def {name}(" in tests


# Commands


@pytest.mark.parametrize("command", TRAINER, ids=" ".join)
def test_every_command_of_the_trainer_parses(command):
    if {"flux", "sd3", "klein"} & set(command):
        pytest.importorskip("diffusers")
    if "--help" not in command:
        flags = trainer.parse(command)
        trainer.check(flags.run, flags.method, world_size=1)


@pytest.mark.parametrize("command", TOOLS, ids=" ".join)
def test_every_tool_and_its_flags_exist(command):
    pytest.importorskip("diffusers")
    from full_scale.__main__ import TOOLS

    if command[0] == "plan":
        from full_scale.plan import read_flags

        read_flags(command[1:])
        return
    flags = {word[2:].replace("-", "_") for word in command if word.startswith("--")}
    assert flags - {"help"} <= set(inspect.signature(pkgutil.resolve_name(TOOLS[command[0]])).parameters)


@pytest.mark.parametrize("command", MODULES, ids=" ".join)
def test_every_module_and_experiment_exists(command):
    from toy.laboratory.__main__ import EXPERIMENTS

    assert importlib.util.find_spec(command[0])
    assert command[0] != "toy.laboratory" or command[1] in {*EXPERIMENTS, "all"}


def test_there_are_commands():
    assert len(TRAINER) >= 9 and len(TOOLS) >= 6 and len(MODULES) >= 8


def test_the_toy_command_installs_the_pinned_versions():
    pinned = (ROOT / "requirements.txt").read_text().split("\n\n")[0].splitlines()[1:]
    (command,) = re.findall(r"pip install (torch==.*?) &&", README.replace("\\\n", ""))
    assert command.split() == pinned


def test_the_toy_needs_only_the_packages_of_its_command(tmp_path):
    """The main job, with a checkpoint, where every other package of requirements.txt cannot be imported."""
    _, others, _ = (ROOT / "requirements.txt").read_text().split("\n\n")
    names = [line.split("==")[0].removesuffix("_torch") for line in others.splitlines()[1:]]
    flags = "--iterations 1 --batch-size 4 --pretrain-steps 1 --reward-steps 1 --evaluation-samples 160 --out".split()
    code = f"""
import sys
from pathlib import Path
sys.modules |= dict.fromkeys({names})
import train_leap_align
from toy import pretrain
pretrain.CACHE = Path({str(tmp_path)!r})
train_leap_align.main({[*flags, str(tmp_path / "run")]})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "diffusers" in names and done.returncode == 0, done.stderr[-500:]
    assert (tmp_path / "run" / "result.json").exists()


# Snippets


def test_the_snippet_trains():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(snippet, names)
    model = torch.nn.Conv2d(16, 16, 1)
    before = model.weight.clone()
    names["update"](
        lambda x, t, prompt: model(x),
        lambda x_0, prompt: x_0.flatten(1).mean(1),
        ["a", "b"],
        torch.optim.SGD(model.parameters(), lr=1.0),
        torch.Generator().manual_seed(0),
    )
    assert not torch.equal(model.weight, before)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the trainer and the toys with the method, the hyperparameter and the task of runtime/README.md."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("leap_align.py", "beyond.py", "train_leap_align.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("runtime", "toy"):
        shutil.copytree(ROOT / name, folder / name)
    examples = re.findall(r"```python\n(.*?)```", PAGES["runtime/README.md"], re.S)
    field, method, method_entry, task = examples
    task_entry = re.search(r'`("points": "my_task:Points")`', PAGES["runtime/README.md"]).group(1)
    insert_before(folder / "leap_align.py", "\n    def __post_init__(self)", field)
    insert_before(folder / "leap_align.py", "METHODS: dict", f"{method}\n\n")
    insert_before(folder / "leap_align.py", '    "refl": refl,', method_entry)
    insert_before(folder / "train_leap_align.py", '    "digits": ', f"    {task_entry},\n")
    (folder / "my_task.py").write_text(task)
    return folder


def insert_before(path, mark, text):
    before, mark, after = path.read_text().rpartition(mark)
    path.write_text(before + text + mark + after)


def run_extended(folder, name, *flags, processes=1):
    """Runs the page's command with more flags; returns the run's folder."""
    (command,) = (command for command in commands("train_leap_align.py") if name in command)
    out = folder / "runs" / f"{name}-{processes}"
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    arguments = [*torchrun, "train_leap_align.py", *command[: command.index("--out")], "--out", out, *flags]
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def test_the_example_of_a_method_and_a_hyperparameter_trains(extended):
    flags = "--iterations 2 --batch-size 16 --pretrain-steps 20 --reward-steps 20 --evaluation-samples 160".split()
    out = run_extended(extended, "draft_k", *flags)
    rows = read_csv(out / "metrics.csv")
    assert json.loads((out / "config.json").read_text())["last"] == 5
    assert all(float(row["grad_norm"]) > 0 for row in rows)
    assert tuple(rows[0]) == ("iteration", *trainer.METRICS)


def test_a_column_of_a_methods_log_appears_once_it_is_in_metrics(monkeypatch, tmp_path):
    @leap_align.method
    def with_path(velocity, x_T, times, hyper, generator):
        x_0 = leap_align.leap(x_T, velocity(x_T, times[-1]), times[-1], 0)
        yield x_0, x_0.new_ones(len(x_0))
        return {"path": (x_0 - x_T).abs().mean()}

    monkeypatch.setitem(trainer.METHODS, "with_path", with_path)
    flags = "--pretrain-steps 20 --reward-steps 20 --evaluation-samples 160 --batch-size 8 --iterations 1".split()
    for columns, is_shown in ((trainer.METRICS, False), ((*trainer.METRICS, "path"), True)):
        monkeypatch.setattr(trainer, "METRICS", columns)
        trainer.main([*flags, "--method", "with_path", "--out", str(tmp_path / str(is_shown))])
        (row,) = read_csv(tmp_path / str(is_shown) / "metrics.csv")
        assert (float(row.get("path", 0)) > 0) == is_shown


def test_the_example_of_a_task_trains_on_one_process_and_on_two(extended):
    one, two = (run_extended(extended, "points", "--iterations", "40", processes=n) for n in (1, 2))
    before, after = (json.loads((one / "result.json").read_text())[when] for when in ("before", "after"))
    assert before["right"] > 0.9 and after["error"] < before["error"] / 2
    for a, b in zip(read_csv(one / "metrics.csv"), read_csv(two / "metrics.csv"), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=1e-4)
        assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-3)
    weights = [torch.load(run / "model" / "weights.pt", weights_only=True) for run in (one, two)]
    for name in weights[0]:
        assert torch.allclose(weights[0][name], weights[1][name], atol=1e-3)


def test_the_example_of_a_task_trains_on_a_leash(extended):
    out = extended / "runs" / "leash"
    run_extended(extended, "points", "--beta", "1", "--iterations", "3", "--out", out)
    values = [float(row["leash"]) for row in read_csv(out / "metrics.csv")]
    assert values[0] == 0 < values[-1]


def test_the_example_of_a_reward_keeps_the_contract():
    from full_scale.rewards import CustomReward, check_reward

    (example,) = re.findall(r"```python\n(.*?)```", PAGES["full_scale/README.md"], re.S)
    names = {}
    exec(example, names)
    check_reward(CustomReward(names["colourful"]()))


# Numbers


def test_every_number_of_the_laboratory_is_in_its_tables():
    """`a ± b` on the pages is a value and its error in some row of the committed CSV files."""
    pages = PAGES["toy/laboratory/README.md"] + PAGES["toy/laboratory/results/README.md"]
    shown = set(re.findall(r"[+-]?\d+\.\d+ ± \d+\.\d+", pages))
    known = set()
    for path in (ROOT / "toy" / "laboratory" / "results").glob("*.csv"):
        for row in read_csv(path):
            pairs = [(row[name], row.get(f"{name}_error")) for name in row]
            pairs += [(row.get("difference"), row.get("error"))]
            for value, error in ((float(v), float(e)) for v, e in pairs if v and e):
                known |= {f"{value:{sign}.{d}f} ± {error:.{d}f}" for sign in ("", "+") for d in (2, 3)}
    assert len(shown) > 150 and not shown - known


def better_and_worse(task, budget):
    """Settings with T up to 12 whose AB2 is beyond error (unpaired t, 95 %, n = 5) better, and worse, than Euler."""
    rows = read_csv(ROOT / "toy" / "laboratory" / "results" / "beyond.csv")
    rows = [row for row in rows if (row["task"], row["budget"]) == (task, budget) and int(row["T"]) <= 12]
    found = {(row["method"], row["option"], row["T"], row["solver"]): row for row in rows}
    pairs = [(found[*key, "euler"], found[*key, "ab2"]) for *key, solver in found if solver == "ab2"]
    assert len(pairs) == 48
    gains = [
        (float(ab2["utility"]) - float(euler["utility"]))
        / (float(ab2["utility_error"]) ** 2 + float(euler["utility_error"]) ** 2) ** 0.5
        for euler, ab2 in pairs
    ]
    return sum(gain > 2.306 for gain in gains), sum(gain < -2.306 for gain in gains)


def test_the_findings_on_the_second_order_solver_and_on_the_published_run_are_those_of_the_tables():
    page = " ".join(PAGES["toy/laboratory/README.md"].split())
    for task, budget, words in (
        ("digits", "small", "better for {} and worse for {} on `digits`"),
        ("toy", "small", "better for {} and worse for {} on `toy`"),
        ("digits", "large", "At 8,700 on `digits` it is better for {} and worse for {}"),
    ):
        assert words.format(*better_and_worse(task, budget)) in page
    rows = read_csv(ROOT / "toy" / "laboratory" / "results" / "beyond-headline.csv")
    first = {row["task"]: float(row["needed"]) / float(row["share_alike"]) for row in rows if row["share_alike"]}
    assert (
        f"after {round(first['digits'], -1):,.0f} evaluations (on `toy` after {round(first['toy'], -1):,.0f})" in page
    )


@pytest.mark.parametrize("head", ["| `toy`: eight modes", "| `digits`: 8x8 images"])
def test_the_toy_tables_of_the_readme_are_those_of_the_toys_page(head):
    _, rows = table(README, head)
    assert len(rows) >= 5
    for name, cells in rows.items():
        assert f"| {name.split()[0]} | {' | '.join(cells)} |" in PAGES["toy/README.md"]


def table(section, head):
    """A table of a page: its columns' names, and its rows by their first cell."""
    lines = section[section.index(head) :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return cells[0][1:], {row[0].strip("`*"): row[1:] for row in cells[2:]}
