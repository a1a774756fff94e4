"""The evaluators of several runs that differ in their seed: mean ± standard error, before and after.

python -m toy.summary runs/a-seed0 runs/a-seed1 ...
"""

import json
import sys
from pathlib import Path

from toy.report import mean, number


def table(folders: list[Path]) -> str:
    """A Markdown table, a row an evaluator."""
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    rows = [f"| n = {len(results)} | before | after |", "|---|---|---|"]
    for name in results[0]["before"]:
        cells = (number(*mean([result[when][name] for result in results])) for when in ("before", "after"))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    for folder in sys.argv[1:]:
        if not Path(folder, "result.json").exists():
            sys.exit(f"error: {folder} holds no finished run: result.json is missing")
    print(table([Path(folder) for folder in sys.argv[1:]]))
