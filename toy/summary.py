"""Several runs that differ in their seed as one Markdown table: python -m toy.summary runs/a runs/b runs/c"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error of the mean, which is unknown (NaN) for a single value."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(np.mean(values)), float(error)


def format_number(value: Any, error: float | None = None) -> str:
    """A table cell: three decimals and the error, if there is one; three digits for tiny numbers."""
    if not isinstance(value, float):
        return str(value)
    if error is not None:
        return f"{value:.3f} ± {error:.3f}"
    return f"{value:.3g}" if 0 < abs(value) < 0.01 else f"{value:.3f}"


def markdown_table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """A Markdown table; a column NAME also shows NAME_error, if the rows have it."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (format_number(row.get(name, ""), row.get(f"{name}_error")) for name in columns)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(folders: list[Path]) -> str:
    """The evaluators of several runs before and after training, mean ± standard error; a row for each."""
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    rows = []
    for name in results[0]["before"]:
        row = {f"n = {len(results)}": name}
        for when in ("before", "after"):
            row[when], row[f"{when}_error"] = mean_and_error([result[when][name] for result in results])
        rows.append(row)
    return markdown_table(rows, [f"n = {len(results)}", "before", "after"])


def main() -> None:
    """Prints the table of the folders on the command line."""
    folders = [Path(argument) for argument in sys.argv[1:]]
    if not folders:
        sys.exit(__doc__)
    for folder in folders:
        if not (folder / "result.json").exists():
            sys.exit(f"error: {folder} holds no finished run: result.json is missing")
    print(summary(folders))


if __name__ == "__main__":
    main()
