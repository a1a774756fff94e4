"""leash: reward, held-out evaluators and diversity against beta and lambda, with early stopping as the control."""

from leap_align import METHODS
from toy.laboratory import plots
from toy.laboratory.laboratory import Laboratory, RunMetrics
from toy.laboratory.tables import Row, summarize, tables

BETAS = {"toy": (0.03, 0.1, 0.3, 1.0, 3.0), "digits": (0.5, 1.0, 2.0, 3.0, 4.0, 10.0)}
"""Without hinge, for every method of the paper; the tasks differ in the scale of their rewards."""
BETAS_WITH_HINGE = {"toy": (0.1, 0.3), "digits": (1.0, 2.0)}  # with the hinge at lambda = 0, for LeapAlign
LAMBDAS = (-1.0, 0.0, 1.0)  # without leash, for LeapAlign
MEASURED_ONLY = 1e-9  # beta of a run without a leash: it changes nothing, but the run has a `v_norm`
LR = 1e-3  # what `compare` chose for LeapAlign with the hinge; not tuned for other methods
CURVE_FRACTIONS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
"""Fractions of the large budget after which a run is evaluated: the control may stop at each of them."""
SHOWN = {"toy": ("utility", "log_density", "spread", "v_norm")}
SHOWN |= {"digits": ("utility", "nearest_real", "diversity", "v_norm")}

Runs = dict[tuple[str, str, float | None, float], list[RunMetrics]]  # (task, method, lambda, beta) -> a list over seeds


def run(lab: Laboratory) -> None:
    """Trains with every beta and lambda over the large budget; without both, early stops are evaluated as well."""
    end, settings = lab.scale.budgets["large"], {}
    stops = sorted({max(1, round(end * fraction)) for fraction in CURVE_FRACTIONS})
    for task in lab.scale.tasks:
        keys = [(method, None, beta) for method in METHODS for beta in (0.0, *BETAS[task])]
        keys += [("leap_align", lam, 0.0) for lam in LAMBDAS]
        for method, lam, beta in keys + [("leap_align", 0.0, beta) for beta in BETAS_WITH_HINGE[task]]:
            run = {"task": task, "method": method, "lr": LR, "hyper": {"lam": lam, "beta": beta or MEASURED_ONLY}}
            settings[task, method, lam, beta] = run | {"evaluate_at": [end] if beta or lam is not None else stops}
    rows = table_rows(lab.run_metrics(settings, "leash"))
    columns = ["kind", "lambda", "beta", "iterations", "evaluators", "v_norm"]
    text = tables(rows, ("task", "method"), "### {task}, {method} (n = {n}, mean ± standard error)", columns)
    lab.publish("leash", rows, text, plots.leash(rows, SHOWN))


def table_rows(runs: Runs) -> list[Row]:
    """A row for each setting and evaluated iteration."""
    rows = []
    for (task, method, lam, beta), seed_runs in runs.items():
        for n in sorted(seed_runs[0]):
            kind = kind_of(lam, beta, is_stopped=n < max(seed_runs[0]))
            row = {"task": task, "method": method, "kind": kind, "lambda": "none" if lam is None else lam}
            metrics = summarize([run[n] for run in seed_runs], task, "grad_norm", "v_norm")
            rows.append(row | {"beta": beta, "iterations": n} | metrics)
    return rows


def kind_of(lam: float | None, beta: float, is_stopped: bool) -> str:
    """What restrains a run: `hinge`, `leash`, `both`, `stop` (early stopping) or `none`."""
    if lam is None:
        return "leash" if beta else "stop" if is_stopped else "none"
    return "both" if beta else "hinge"
