"""Entries of the tables: means over seeds with their errors, and whether the toys agree with the paper's directions."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from toy.summary import markdown_table, mean_and_error

CONFIDENCE = 0.95
VERDICTS = ("agrees", "disagrees", "within error")


def summarize(metrics: list[dict[str, float]]) -> dict[str, float]:
    """NAME and NAME_error of every metric over several runs, and their number n."""
    columns = {"n": len(metrics)}
    for name in metrics[0]:
        columns[name], columns[f"{name}_error"] = mean_and_error([values[name] for values in metrics])
    return columns


@dataclass(frozen=True)
class Direction:
    """A claim of the paper that one option has a greater metric than another; here both have a value for each seed."""

    claim: str
    source: str
    task: str
    metric: str
    when: str
    greater: list[float]
    lesser: list[float]

    def row(self) -> dict[str, Any]:
        """The mean difference seed by seed, its standard error, and whether the toy agrees with the paper.

        By Student's t at 95 %: a difference that it cannot distinguish from zero is `within error`.
        """
        difference, error = mean_and_error([a - b for a, b in zip(self.greater, self.lesser, strict=True)])
        n = len(self.greater)
        bound = student_t.ppf((1 + CONFIDENCE) / 2, n - 1) * error if n > 1 else np.inf
        agrees, disagrees, within_error = VERDICTS
        verdict = within_error
        if abs(difference) > bound:
            verdict = agrees if difference > 0 else disagrees
        return {
            "claim": self.claim,
            "source": self.source,
            "figure": self.metric,
            "task": self.task,
            "when": self.when,
            "n": n,
            "difference": difference,
            "error": error,
            "toy": verdict,
        }


def verdicts(rows: list[dict[str, Any]]) -> str:
    """Rows of directions as a Markdown table: a row for each claim, a column for each task and stage of training."""
    table: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        claim = {name: row[name] for name in ("claim", "source", "figure")}
        table_row = table.setdefault(tuple(claim.values()), claim)
        table_row[f"{row['task']}, {row['when']}"] = f"{row['toy']}, {row['difference']:+.3f} ± {row['error']:.3f}"
    columns = dict.fromkeys(name for table_row in table.values() for name in table_row)
    return markdown_table(list(table.values()), list(columns))


def tally(rows: list[dict[str, Any]]) -> str:
    """How many directions agree, disagree, or are within error."""
    counts = Counter(row["toy"] for row in rows)
    return f"{len(rows)} comparisons: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
