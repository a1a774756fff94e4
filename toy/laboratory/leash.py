"""leash: reward, held-out evaluators and diversity against beta and lambda, with early stopping as the control."""

from typing import Any

from runtime.run_dir import write_csv
from toy.laboratory import plots
from toy.laboratory.laboratory import EVALUATORS, Laboratory, RunMetrics
from toy.laboratory.tables import summarize
from toy.summary import markdown_table

METHODS_ON_A_LEASH = ("leap_align", "drtune", "refl", "draft_lv")
"""The paper's methods that a large model can afford."""
BETAS = {"toy": (0.03, 0.1, 0.3, 1.0, 3.0), "digits": (0.5, 1.0, 2.0, 4.0, 10.0)}
"""Without hinge, for every method; the tasks differ in the scale of their rewards."""
BETAS_WITH_HINGE = {"toy": (0.1, 0.3), "digits": (1.0, 2.0)}
"""With the hinge at lambda = 0, for LeapAlign."""
LAMBDAS = (-1.0, 0.0, 1.0)
"""Without leash, for LeapAlign."""
MEASURED_ONLY = 1e-9
"""A leash that pulls nothing, so that runs without one have a `v_norm`, too."""
LR = 1e-3
"""The learning rate that `compare` chose for most methods' large budget, on both tasks."""
CURVE_FRACTIONS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
"""Fractions of the large budget after which a run is evaluated: the control may stop at each of them."""
SHOWN = {
    "toy": ("utility", "log_density", "spread", "v_norm"),
    "digits": ("utility", "nearest_real", "diversity", "v_norm"),
}
"""Held-out evaluators in the figure, and the velocity's norm over the reference's."""

Runs = dict[tuple[str, str, float | None, float], list[RunMetrics]]
"""(task, method, lambda, beta) -> the metrics of its runs, a list over the seeds."""


def run(lab: Laboratory) -> None:
    """Trains with every leash and hinge, and writes the table, the curves and the figure."""
    runs = training_runs(lab)
    rows, curves = table_rows(runs), curve_rows(runs)
    lab.publish("leash", rows, tables(rows))
    write_csv(lab.out / "leash-curves.csv", curves)
    plots.leash(lab.out / "leash.png", rows, SHOWN)


def settings_of(task: str) -> list[tuple[str, float | None, float]]:
    """(method, lambda, beta) of every training run of a task."""
    alone = [(method, None, beta) for method in METHODS_ON_A_LEASH for beta in (0.0, *BETAS[task])]
    hinges = [("leap_align", lam, 0.0) for lam in LAMBDAS]
    return alone + hinges + [("leap_align", 0.0, beta) for beta in BETAS_WITH_HINGE[task]]


def training_runs(lab: Laboratory) -> Runs:
    """All runs, evaluated along the large budget."""
    iterations = lab.scale.budgets["large"]
    evaluate_at = sorted({max(1, round(iterations * fraction)) for fraction in CURVE_FRACTIONS})
    settings: dict[tuple, dict[str, Any]] = {}
    for task in lab.scale.tasks:
        for method, lam, beta in settings_of(task):
            hyper = {"lam": lam, "beta": beta or MEASURED_ONLY}
            settings[task, method, lam, beta] = {"task": task, "method": method, "lr": LR, "hyper": hyper}
            settings[task, method, lam, beta] |= {"evaluate_at": evaluate_at}
    return lab.run_metrics(settings, "leash")


def curve_rows(runs: Runs) -> list[dict]:
    """A row for each setting and evaluated iteration."""
    return [
        {"task": task, "method": method, "lambda": "none" if lam is None else lam, "beta": beta, "iterations": n}
        | summarize([run[n] for run in seed_runs])
        for (task, method, lam, beta), seed_runs in runs.items()
        for n in sorted(seed_runs[0])
    ]


def table_rows(runs: Runs) -> list[dict]:
    """The end of every run; and, as the control, every earlier evaluation of the runs without hinge and leash."""
    rows = []
    for row in curve_rows(runs):
        is_free, is_end = (row["lambda"], row["beta"]) == ("none", 0.0), row["iterations"] == last_iteration(runs)
        if is_end or is_free:
            rows.append({"task": row["task"], "kind": kind(row, is_end)} | row)
    return rows


def last_iteration(runs: Runs) -> int:
    """The iteration at which all runs end."""
    return max(next(iter(runs.values()))[0])


def kind(row: dict, is_end: bool) -> str:
    """What holds a run back: `stop` (early stopping), `hinge`, `leash`, `both`, or `none`."""
    has_hinge, has_leash = row["lambda"] != "none", row["beta"] > 0
    names = {(True, True): "both", (True, False): "hinge", (False, True): "leash", (False, False): "none"}
    return names[has_hinge, has_leash] if is_end else "stop"


def tables(rows: list[dict]) -> str:
    """A table for each task and method."""
    blocks = []
    for task, method in dict.fromkeys((row["task"], row["method"]) for row in rows):
        table_rows = [row for row in rows if (row["task"], row["method"]) == (task, method)]
        columns = ["kind", "lambda", "beta", "iterations", *EVALUATORS[task], "v_norm"]
        blocks.append(f"### {task}, {method} (n = {table_rows[0]['n']}, mean ± standard error)")
        blocks.append(markdown_table(table_rows, columns))
    return "\n\n".join(blocks)
