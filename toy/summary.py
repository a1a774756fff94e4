"""Several runs that differ in their seed as one Markdown table: python -m toy.summary runs/a runs/b runs/c"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from leap_align import BadInput, require
from runtime.files import read_json

# Settings in which the runs of one table may differ: their seeds, and what never changes a result.
MAY_DIFFER = set("seed out resume gradient_accumulation_steps evaluate_every checkpoint_every".split())
MAY_DIFFER |= {"checkpoint_minutes", "checkpoints_total_limit", "max_skipped_steps"}


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
    """The evaluators of several runs before and after training, mean ± standard error; a row for each.

    Raises BadInput for runs that differ in more than their seed, or that have the same seed.
    """
    results = [_result(folder) for folder in folders]
    _check_same_settings(folders)
    rows = []
    for name in results[0]["before"]:
        row = {f"n = {len(results)}": name}
        for when in ("before", "after"):
            row[when], row[f"{when}_error"] = mean_and_error([result[when][name] for result in results])
        rows.append(row)
    return markdown_table(rows, [f"n = {len(results)}", "before", "after"])


def _result(folder: Path) -> dict[str, dict[str, float]]:
    """result.json of a finished run."""
    path = folder / "result.json"
    require(path.exists(), f"{folder} holds no finished run: result.json is missing")
    result = read_json(path)
    figures = [result.get(when) for when in ("before", "after")]
    whole = all(isinstance(row, dict) and all(isinstance(x, int | float) for x in row.values()) for row in figures)
    require(whole, f"{path} is not that of a run: it has no `before` and `after` with numbers")
    return result


def _check_same_settings(folders: list[Path]) -> None:
    """Refuses runs that are not repetitions of one run with other seeds."""
    first, *others = (read_json(folder / "config.json") for folder in folders)
    seeds = {first.get("seed"): folders[0]}
    for folder, settings in zip(folders[1:], others):
        for name in (name for name in first | settings if name not in MAY_DIFFER):
            old, new = first.get(name), settings.get(name)
            values = f"{name} is {old} in {folders[0]}, {new} in {folder}"
            require(old == new, f"these runs differ in more than their seed: {values}; summarise them separately")
        seed = settings.get("seed")
        require(seed not in seeds, f"{seeds.get(seed)} and {folder} have the same seed, {seed}: give only one of them")
        seeds[seed] = folder


def main() -> None:
    """Prints the table of the folders on the command line."""
    folders = [Path(argument) for argument in sys.argv[1:]]
    if not folders:
        sys.exit(__doc__)
    try:
        print(summary(folders))
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
