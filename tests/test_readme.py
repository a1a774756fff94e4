"""The README: what it names exists, its snippet runs, its commands parse."""

import csv
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import leap_align
import train_leap_align as trainer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
TABLE = re.search(r"\| equation \|.*?\n\n", README, re.S).group().splitlines()[2:]
LINES = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in re.split(r"[;\n]|&&", block.replace("\\\n", " "))
]
COMMANDS = [
    line.replace("$s", "0").replace("$m", "refl").split("train_leap_align.py", 1)[1].split()
    for line in LINES
    if "train_leap_align.py" in line
]
MODULES = [line.split("python -m ", 1)[1].split("#")[0].split() for line in LINES if "python -m " in line]
TOOLS = [line.split("flux_adapter.py", 1)[1].split("#")[0].split() for line in LINES if "flux_adapter.py" in line]


@pytest.mark.parametrize("row", [row for row in TABLE if row], ids=lambda row: row.split("|")[1].strip())
def test_every_function_and_test_of_the_equation_table_exists(row):
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    _, _, here, proof, _ = re.split(r"(?<!\\)\|", row)
    for name in re.findall(r"`(\w+)`", here):
        assert callable(getattr(leap_align, name)) or name in ("RECTIFIED", "COSINE")
    for name in (names := re.findall(r"`(\w+)`", proof)):
        assert f"def {name}(" in tests
    assert names


def test_every_equation_function_stands_in_the_table():
    assert {f"`{name}`" for name in leap_align.METHODS} - {"`full_backprop`"} <= set(
        re.findall(r"`\w+`", "".join(TABLE))
    )


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_is_understood(command):
    if "flux" in command:
        pytest.importorskip("diffusers")
    config, hyper, _, _ = trainer.parse(command)
    trainer.check(config, hyper, world=1)


@pytest.mark.parametrize("command", TOOLS, ids=" ".join)
def test_every_tool_and_its_flags_exist(command):
    pytest.importorskip("diffusers")
    from flux_adapter import TOOLS

    known = inspect.signature(TOOLS[command[0]]).parameters
    assert {word[2:].replace("-", "_") for word in command if word.startswith("--")} <= set(known)


@pytest.mark.parametrize("command", MODULES, ids=" ".join)
def test_every_module_and_experiment_exists(command):
    from toy.experiments import EXPERIMENTS

    assert importlib.util.find_spec(command[0])
    assert command[0] != "toy.experiments" or command[1] in {*EXPERIMENTS, "all"}


def test_there_are_commands():
    assert len(COMMANDS) >= 9 and len(TOOLS) >= 6 and len(MODULES) >= 8


def test_the_snippet_trains():
    snippet, *_ = re.findall(r"```python\n(.*?)```", README, re.S)
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


def test_the_example_of_a_reward_keeps_the_contract():
    from rewards import Own, check_reward

    _, example = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(example, names)
    check_reward(Own(names["colourful"]()))


def test_the_toy_command_installs_what_is_pinned():
    pinned = (ROOT / "requirements.txt").read_text().split("\n\n")[0].splitlines()[1:]
    (command,) = re.findall(r"pip install (torch==.*?) &&", README.replace("\\\n", ""))
    assert command.split() == pinned


def test_the_toy_needs_no_more_than_its_command_installs(tmp_path):
    """The main job to its end, checkpoint and all, where every other package of requirements.txt cannot be imported."""
    _, others, _ = (ROOT / "requirements.txt").read_text().split("\n\n")
    names = [line.split("==")[0].removesuffix("_torch") for line in others.splitlines()[1:]]
    code = f"""
import sys
from pathlib import Path
sys.modules |= dict.fromkeys({names})
import train_leap_align
from toy import learn
learn.CACHE = Path({str(tmp_path)!r})
train_leap_align.main({["--iterations", "1", "--batch-size", "4", "--pretrain-steps", "1", "--reward-steps", "1"]}
                      + ["--evaluation-samples", "160", "--out", {str(tmp_path / "run")!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "diffusers" in names and done.returncode == 0, done.stderr[-500:]
    assert (tmp_path / "run" / "result.json").exists()


def test_every_picture_exists():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).stat().st_size > 0


def test_every_figure_of_the_laboratory_stands_in_its_tables():
    """`a ± b` of the README is a value and its error of some row of the committed CSV files."""
    section = re.search(r"## The laboratory.*?(?=## The trainer)", README, re.S).group()
    told = set(re.findall(r"[+-]?\d+\.\d+ ± \d+\.\d+", section))
    known = set()
    for path in (ROOT / "toy" / "results").glob("*.csv"):
        with path.open() as file:
            for row in csv.DictReader(file):
                pairs = [(row[name], row.get(f"{name}_error")) for name in row]
                pairs += [(row.get("difference"), row.get("error"))]
                for value, error in ((float(v), float(e)) for v, e in pairs if v and e):
                    known |= {f"{value:{sign}.{d}f} ± {error:.{d}f}" for sign in ("", "+") for d in (2, 3)}
    assert len(told) > 150 and not told - known


def table(section, head):
    """A table of the README: its columns' names, and its rows by their first cell."""
    lines = section[section.index(head) :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return cells[0][1:], {row[0].strip("`*"): row[1:] for row in cells[2:]}


def benchmark(name):
    with (ROOT / "toy" / "results" / f"benchmark-{name}.csv").open() as file:
        return list(csv.DictReader(file))


def agree(told, value):
    """Whether a number of the README is this one, to the digits that it shows."""
    digits = len(told.partition(".")[2])
    return abs(float(told) - float(value)) <= 0.5000001 * 10**-digits


COSTS = re.search(r"## What a step costs.*?(?=## FLUX)", README, re.S).group()
NAMES = {"toy": "toy", "digits": "digits", "tiny FLUX": "tiny flux", "tiny SD3.5": "tiny sd3"}
"""Tasks in the README and in the benchmark's tables."""


def test_operations_of_the_readme_are_those_of_the_benchmark():
    found = {(row["task"], row["method"]): row["network"] for row in benchmark("flops")}
    known = {"leap_align`, gradient checkpointing": "leap_align, checkpoints"}
    _, rows = table(COSTS, "| operations")
    assert len(rows) == 7
    for name, cells in rows.items():
        method = "two passes" if "two passes" in name else known.get(name, name.split("`")[0])
        for cell, tasks in zip(cells, (("toy", "digits"), ("tiny flux",), ("tiny sd3",)), strict=True):
            assert not cell or all(agree(cell, found[task, method]) for task in tasks)


def test_bytes_of_the_readme_are_those_of_the_benchmark():
    found = {(row["task"], row["T"]): (row["leap_align MiB"], row["full_backprop MiB"]) for row in benchmark("memory")}
    columns, rows = table(COSTS, "| MiB")
    assert len(rows) == 4
    for name, cells in rows.items():
        for cell, column in zip(cells, columns, strict=True):
            pair = found[NAMES[name.split(",")[0].strip("`")], column.removeprefix("T = ")]
            assert all(map(agree, cell.split(" / "), pair))


@pytest.mark.parametrize(("head", "name", "keys"), [
    ("| a step |", "time", ("step ms", "bare ms", "ratio", "of it update", "unwrapped ms", "over unwrapped")),
    ("| share of a step |", "shares", None),
    ("| main job, seconds", "job", None),
])  # fmt: skip
def test_times_of_the_readme_are_those_of_the_benchmark(head, name, keys):
    """A cell is a value, or a value and its error; the columns are the table's own unless named here."""
    columns, rows = table(COSTS, head)
    runs = {"first": "first", "with the cache": "second"}
    found = {(row["task"], row.get("run")): row for row in benchmark(name)}
    assert len(rows) == 4
    for about, cells in rows.items():
        task, _, run = (part.strip() for part in about.replace("`", "").partition(","))
        row = found[NAMES[task], runs.get(run)]
        for cell, key in zip(cells, keys or [{"building": "build", "all": "seconds"}.get(c, c) for c in columns]):
            told = cell.split(" ± ")
            assert not cell or all(map(agree, told, (row[key], row.get(f"{key}_error")))), (about, key, cell, row[key])


def test_before_and_after_of_the_readme_are_the_committed_ones():
    _, rows = table(COSTS, "| what was mended")
    found = {row["what"].strip("`*"): [row["before"], row["after"], row["where"]] for row in benchmark("before-after")}
    assert len(rows) >= 10 and rows == found
