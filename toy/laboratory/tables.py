"""Tables: means over seeds with their errors, and whether the toys agree with what the paper reports."""

from collections import Counter
from typing import Any

from scipy.stats import t as student_t

from toy.summary import markdown_table, mean_and_error

EVALUATORS = {
    "toy": ("reward", "utility", "alignment", "log_density", "spread"),
    "digits": ("reward", "utility", "svm", "forest", "nearest_real", "diversity"),
}
"""Evaluators of each task: the reward that is trained on, then the held-out ones, with diversity last."""
CONFIDENCE = 0.95
VERDICTS = ("agrees", "disagrees", "within error")

Row = dict[str, Any]


def groups(rows: list[Row], *columns: str) -> dict[tuple, list[Row]]:
    """The rows by their values in some columns; groups and rows keep their order."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in columns), []).append(row)
    return found


def summarize(metrics: list[dict[str, float]], task: str, *others: str) -> dict[str, float]:
    """n, the number of runs, and NAME and NAME_error over them of the task's evaluators and of other metrics."""
    columns = {"n": len(metrics)}
    for name in (*EVALUATORS[task], *others):
        columns[name], columns[f"{name}_error"] = mean_and_error([values[name] for values in metrics])
    return columns


def tables(rows: list[Row], by: tuple[str, ...], title: str, columns: list[str]) -> str:
    """A Markdown table, with its title, for each group of rows that are equal in the columns `by`.

    title: a format string over the columns; n is the greatest of the group.  columns: `evaluators` are the task's.
    """
    blocks = []
    for group in groups(rows, *by).values():
        shown, n = list(columns), max(row.get("n", 0) for row in group)
        if "evaluators" in shown:
            shown[(at := shown.index("evaluators")) : at + 1] = EVALUATORS[group[0]["task"]]
        blocks += [title.format(**group[0] | {"n": n}), markdown_table(group, shown)]
    return "\n\n".join(blocks)


def direction(
    claim: str, source: str, task: str, metric: str, when: str, greater: list[float], lesser: list[float]
) -> Row:
    """Whether the toy agrees with the paper that one option has a greater metric than another; a value for each seed.

    The row holds the mean difference, seed by seed, and its standard error.  A difference that Student's t cannot
    distinguish from zero at 95 % is `within error`.
    """
    difference, error = mean_and_error([a - b for a, b in zip(greater, lesser, strict=True)])
    n, (agrees, disagrees, verdict) = len(greater), VERDICTS
    if abs(difference) > student_t.ppf((1 + CONFIDENCE) / 2, n - 1) * error:
        verdict = agrees if difference > 0 else disagrees
    row = {"claim": claim, "source": source, "figure": metric, "task": task, "when": when, "n": n}
    return row | {"difference": difference, "error": error, "toy": verdict}


def directions_table(rows: list[Row]) -> str:
    """Rows of `direction`: a title with their counts, and a table with a row a claim and a column a task and stage."""
    counts = Counter(row["toy"] for row in rows)
    tally = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
    table = []
    for key, group in groups(rows, "claim", "source", "figure").items():
        verdicts = (f"{row['toy']}, {row['difference']:+.3f} ± {row['error']:.3f}" for row in group)
        stages = (f"{row['task']}, {row['when']}" for row in group)
        table.append(dict(zip(("claim", "source", "figure"), key)) | dict(zip(stages, verdicts)))
    columns = list(dict.fromkeys(name for row in table for name in row))
    title = f"### The paper's directions (n = {rows[0]['n']}; {len(rows)} comparisons: {tally})"
    return f"{title}\n\n{markdown_table(table, columns)}"
