"""Numbers of the pages are those of the CSV files.  `python -m tests.test_tables` writes them into the tables."""

import math
import re
from itertools import zip_longest
from pathlib import Path

import pytest

from runtime.files import read_csv

ROOT = Path(__file__).resolve().parent.parent
LABORATORY = ROOT / "toy" / "laboratory"
FINDINGS, RESULTS = LABORATORY / "README.md", LABORATORY / "results" / "README.md"
SHAPES = ROOT / "full_scale" / "shapes" / "README.md"


def read(name):
    return read_csv(LABORATORY / "results" / f"{name}.csv")


def number(name, digits=3, missing=""):
    """The cell of a column: its value with so many digits, and its error if there is one."""

    def cell(row):
        return " ± ".join(f"{float(row[n]):.{digits}f}" for n in (name, f"{name}_error") if row.get(n)) or missing

    return cell


def setting(row):
    """What a method of the findings trains with."""
    solver = {"ab2": "AB2", "euler": "Euler"}[row["solver"]]
    return ", ".join(filter(None, [row["option"].replace("alpha", "α"), f"T {row['T']}", solver]))


def verdict(row):
    """Whether the toys agree with the paper, and the difference."""
    return f"{dict(agrees='✓', disagrees='✗').get(row['toy'], '○')} {float(row['difference']):+.3f}"


WORDS = {
    "toy": {"task": "toy"}, "digits": {"task": "digits"},
    "60": {"budget": "small", "when": "60 iterations"}, "20": {"when": "20 iterations"}, "300": {"budget": "large"},
    "AB2": {"solver": "ab2"},
    **{f"α {alpha}": {"option": f"alpha {alpha}"} for alpha in (0, 0.3, 1)},
    "timesteps 4 to 8": {"option": "low 4"}, "timesteps 1 to 4": {"option": "high 4"},
    "T = 8": {"T": "8"}, "T = 25": {"T": "25"}, "norm": {"figure": "grad_norm"}, "utility": {"figure": "utility"},
    "no restraint": {"kind": "none"}, "early stop at 30, its best": {"kind": "stop", "iterations": "30"},
    "hinge λ = 0": {"kind": "hinge", "lambda": "0.0"}, "leash β = 3": {"kind": "leash", "beta": "3.0"},
    "hinge λ = 0, leash β = 1": {"kind": "both", "beta": "1.0"},
}  # fmt: skip
"""Columns and values that a word of a label stands for.  Any other word is a value of the table's key column."""

HINGE, LARGE = {"hinge": "hinge", "equal": "samples"}, {"task": "digits", "budget": "large"}
BEST = {"setting": setting, "share": number("share", 2, "–")}
BEYOND, UTILITY = {"option": "|K 3", "solver": "euler"}, {"": number("utility")}
COSINES = {"evaluations": number("evaluations", 0), "at equal cost": number("step_cosine")}
TABLES = [
    (FINDINGS, "| method |", "beyond-headline", "method", {}, BEST),
    (FINDINGS, "| `digits`, LeapAlign |", "leash", "kind", {"task": "digits", "method": "leap_align"}, {}),
    (RESULTS, "| method | FLUX, quoted |", "compare", "method", HINGE, {"": number("reward")}),
    (RESULTS, "| `toy` |", "compare", "method", HINGE | LARGE | {"task": "toy"}, {}),
    (RESULTS, "| `digits` |", "compare", "method", HINGE | LARGE, {}),
    (RESULTS, "| `toy`, 870 |", "beyond", "method", BEYOND | {"task": "toy"}, UTILITY),
    (RESULTS, "| `digits`, 870 |", "beyond", "method", BEYOND | {"task": "digits"}, UTILITY),
    (RESULTS, "| branch |", "guidance", "branch", {"iterations": "60"}, {"length": number("ratio")}),
    (RESULTS, "| method | evaluations |", "beyond-fidelity", "method", {}, COSINES),
    (RESULTS, "| claim |", "ablations-directions", "claim", {"figure": "reward"}, {"": verdict}),
    (SHAPES, "| on the leash |", "shapes", "method", {"restraint": "leash", "equal": "iterations"}, {}),
    (SHAPES, "| with the hinge |", "shapes", "method", {"restraint": "hinge", "equal": "iterations"}, {}),
    (RESULTS, "| method | `toy`, c", "fidelity", "method", {"T": "25", "iterations": "0"}, {"length": number("ratio")}),
]
"""Page, beginning of the table, CSV file, key column, values that all cells share, and cells by the end of a head; a
column of the file at the end of a head needs no entry among them."""


def split(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def values(label, key, known):
    """The columns and values that a label stands for."""
    first, comma, rest = label.partition(", ")
    if label in WORDS or label in known or not comma:
        return WORDS.get(label, {key: label})
    return values(first, key, known) | values(rest, key, known)


def filled(table, name, key, shared, cells):
    """The table with the numbers of the CSV file.  A column whose words have no meaning stays (`FLUX, quoted`)."""
    rows = read(name)

    def cell(label, head, old):
        *words, last = head.split(", ")
        shown = last if last in cells or last in rows[0] else ""
        words += [] if shown else [last]
        if not {*words} <= {*WORDS}:
            return old
        wanted = shared | values(label, key, {row[key] for row in rows})
        wanted |= {column: value for word in words for column, value in WORDS[word].items()}
        fits = [row for row in rows if all(row[c] in v.split("|") for c, v in wanted.items() if c in row)]
        (text,) = {cells.get(shown, number(shown))(row) for row in fits} or {""}
        return text

    header, rule, *lines = table.splitlines()
    heads, lines = split(header.replace("`", ""))[1:], [split(line) for line in lines]
    for i, (label, *old) in enumerate(lines):
        new = [cell(label.replace("`", ""), *pair) for pair in zip_longest(heads, old, fillvalue="")]
        lines[i] = f"| {' | '.join([label, *new])} |"
    return "\n".join([header, rule, *lines])


def table_of(page, head):
    return re.search(rf"^{re.escape(head)}.*?(?=\n\n|\n?\Z)", page.read_text(), re.M | re.S).group()


@pytest.mark.parametrize(("page", "head", "spec"), [(page, head, spec) for page, head, *spec in TABLES])
def test_a_table_has_the_numbers_of_its_csv_file(page, head, spec):
    table = table_of(page, head)
    assert filled(table, *spec) == table


def test_every_table_of_the_laboratory_has_a_csv_file():
    for page in (FINDINGS, RESULTS):
        assert page.read_text().count("\n|---") == sum(page == p for p, *_ in TABLES)


def test_the_papers_scores_are_those_of_the_claims():
    known = {"0.3078", "0.6535", "0.7011", "0.7024", "0.7101", "0.7420"}  # before training; GenEval
    known |= {score for row in read("compare-directions") for score in re.findall(r"0\.\d{4}", row["source"])}
    for page, head in ((RESULTS, "| method | FLUX"), (ROOT / "full_scale" / "README.md", "| | base | ReFL")):
        assert {*re.findall(r"\d\.\d{4}", table_of(page, head))} <= known


def test_every_number_with_an_error_is_in_a_csv_file():
    rows = [row for path in (LABORATORY / "results").glob("*.csv") for row in read_csv(path)]
    known = {number(n, digits)(row) for row in rows for n in row if row.get(f"{n}_error") for digits in (2, 3)}
    shown = set(re.findall(r"-?\d+\.\d+ ± \d+\.\d+", FINDINGS.read_text() + RESULTS.read_text() + SHAPES.read_text()))
    assert len(shown) > 150 and not shown - known


def test_the_finding_on_the_second_order_solver_is_that_of_the_tables():
    """Settings whose AB2 is beyond error (unpaired t, 95 %, n = 5) better, and worse, than Euler, both at T = 8."""
    for task in ("toy", "digits"):
        rows = [row for row in read("beyond") if row["task"] == task and row["T"] == "8"]
        found = {tuple(row[n] for n in ("method", "option", "solver")): row for row in rows}
        both = [(found[*key, "ab2"], found[*key, "euler"]) for *key, solver in found if solver == "ab2"]
        gains = [float(ab2["utility"]) - float(euler["utility"]) for ab2, euler in both]
        t = [gain / math.hypot(*(float(row["utility_error"]) for row in rows)) for gain, rows in zip(gains, both)]
        assert len(t) == 10
        words = f"better for {sum(x > 2.306 for x in t)} and worse for {sum(x < -2.306 for x in t)} on `{task}`"
        assert words in " ".join(FINDINGS.read_text().split())


def test_the_tables_of_the_readme_are_those_of_the_toys_page():
    readme, toys = ((ROOT / folder / "README.md").read_text() for folder in ("", "toy"))
    rows = re.findall(r"^\| (\w+)[^|]*(\|[^|]*\|[^|]* ± [^|]*\|[^|]*\|)$", readme, re.M)
    assert len(rows) >= 11 and all(f"| {name} {cells}" in toys for name, cells in rows)


if __name__ == "__main__":
    for page, head, *spec in TABLES:
        page.write_text(page.read_text().replace(table := table_of(page, head), filled(table, *spec)))
