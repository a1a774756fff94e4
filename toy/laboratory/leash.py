"""leash: reward, held-out evaluators and diversity against beta and lambda, with early stopping as the control."""

from leap_align import METHODS
from toy.laboratory import plots
from toy.laboratory.laboratory import EVALUATORS, Laboratory, RunMetrics
from toy.laboratory.tables import summarize
from toy.summary import markdown_table

BETAS = {"toy": (0.03, 0.1, 0.3, 1.0, 3.0), "digits": (0.5, 1.0, 2.0, 3.0, 4.0, 10.0)}
"""Without hinge, for every method of the paper; the tasks differ in the scale of their rewards."""
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
    """Trains with every leash and hinge, and writes the table and the figure."""
    rows = table_rows(training_runs(lab))
    lab.publish("leash", rows, tables(rows))
    plots.leash(lab.out / "leash.png", rows, SHOWN)


def settings_of(task: str) -> list[tuple[str, float | None, float]]:
    """(method, lambda, beta) of every training run of a task; those without both come first of each method."""
    alone = [(method, None, beta) for method in METHODS for beta in (0.0, *BETAS[task])]
    hinges = [("leap_align", lam, 0.0) for lam in LAMBDAS]
    return alone + hinges + [("leap_align", 0.0, beta) for beta in BETAS_WITH_HINGE[task]]


def training_runs(lab: Laboratory) -> Runs:
    """All runs over the large budget; one without hinge and leash is evaluated along it, to stop there."""
    end, settings = lab.scale.budgets["large"], {}
    stops = sorted({max(1, round(end * fraction)) for fraction in CURVE_FRACTIONS})
    for task in lab.scale.tasks:
        for method, lam, beta in settings_of(task):
            settings[task, method, lam, beta] = {
                "task": task,
                "method": method,
                "lr": LR,
                "evaluate_at": [end] if beta or lam is not None else stops,
                "hyper": {"lam": lam, "beta": beta or MEASURED_ONLY},
            }
    return lab.run_metrics(settings, "leash")


def table_rows(runs: Runs) -> list[dict]:
    """A row for each setting and evaluated iteration."""
    rows = []
    for (task, method, lam, beta), seed_runs in runs.items():
        for iteration in sorted(seed_runs[0]):
            kind = kind_of(lam, beta, is_stopped=iteration < max(seed_runs[0]))
            row = {"task": task, "method": method, "kind": kind, "lambda": "none" if lam is None else lam}
            row |= {"beta": beta, "iterations": iteration}
            rows.append(row | summarize([run[iteration] for run in seed_runs]))
    return rows


def kind_of(lam: float | None, beta: float, is_stopped: bool) -> str:
    """What holds a run back: `hinge`, `leash`, `both`, `stop` (early stopping) or `none`."""
    if lam is None and not beta:
        return "stop" if is_stopped else "none"
    if not beta:
        return "hinge"
    return "leash" if lam is None else "both"


def tables(rows: list[dict]) -> str:
    """A table for each task and method."""
    blocks = []
    for task, method in dict.fromkeys((row["task"], row["method"]) for row in rows):
        table_rows = [row for row in rows if (row["task"], row["method"]) == (task, method)]
        columns = ["kind", "lambda", "beta", "iterations", *EVALUATORS[task], "v_norm"]
        blocks.append(f"### {task}, {method} (n = {table_rows[0]['n']}, mean ± standard error)")
        blocks.append(markdown_table(table_rows, columns))
    return "\n\n".join(blocks)
