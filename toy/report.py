"""What the experiments say: means with their errors, the paper's directions held against them, tables."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

CONFIDENCE = 0.95


def mean(values: list[float]) -> tuple[float, float]:
    """Mean and standard error of the mean, which of a single value is not known."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(np.mean(values)), float(error)


@dataclass(frozen=True)
class Direction:
    """Something of which the paper says that it is greater than something else, both a value a seed."""

    claim: str
    source: str
    task: str
    figure: str
    when: str
    greater: list[float]
    lesser: list[float]

    def row(self) -> dict[str, Any]:
        """The mean difference, seed by seed, its standard error, and whether the paper's sign is seen.

        By Student's t at 95 %: a difference that it cannot tell from zero is `within error`.
        """
        difference, error = mean([a - b for a, b in zip(self.greater, self.lesser, strict=True)])
        n = len(self.greater)
        bound = student.ppf((1 + CONFIDENCE) / 2, n - 1) * error if n > 1 else np.inf
        seen = "agrees" if difference > bound else "disagrees" if difference < -bound else "within error"
        names = ("claim", "source", "figure", "task", "when")
        return {name: getattr(self, name) for name in names} | {
            "n": n,
            "difference": difference,
            "error": error,
            "toy": seen,
        }


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """A CSV file with every column that any row has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


def number(value: Any, error: float | None = None) -> str:
    """As it stands in a table: three decimals, with its error if it has one; else three digits of what is tiny."""
    if not isinstance(value, float):
        return str(value)
    form = "{:.3g}" if error is None and 0 < abs(value) < 0.01 else "{:.3f}"
    return form.format(value) + ("" if error is None else f" ± {form.format(error)}")


def markdown(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """A Markdown table; a column that has an error beside it (NAME and NAME_error) shows both."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (number(row.get(name, ""), row.get(f"{name}_error")) for name in columns)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(rows: list[dict[str, Any]]) -> str:
    """Rows of directions as a Markdown table, a row a claim: what each task shows, and by how much."""
    places = list(dict.fromkeys((row["task"], row["when"]) for row in rows))
    found: dict[tuple, dict] = {}
    for row in rows:
        shown = f"{row['toy']}, {row['difference']:+.3f} ± {row['error']:.3f}"
        about = {name: row[name] for name in ("claim", "source", "figure")}
        found.setdefault(tuple(about.values()), about)[f"{row['task']}, {row['when']}"] = shown
    return markdown(list(found.values()), ["claim", "source", "figure", *(", ".join(place) for place in places)])


def tally(rows: list[dict[str, Any]]) -> str:
    """How many directions came out which way."""
    counts = {toy: sum(row["toy"] == toy for row in rows) for toy in ("agrees", "disagrees", "within error")}
    return f"{len(rows)} comparisons: " + ", ".join(f"{count} {toy}" for toy, count in counts.items())
