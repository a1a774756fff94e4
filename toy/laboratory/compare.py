"""compare: every method at its best learning rate, at equal samples and at equal compute."""

from itertools import product

from leap_align import METHODS
from toy.laboratory import plots
from toy.laboratory.laboratory import HINGES, Laboratory, RunMetrics, Scale
from toy.laboratory.tables import Row, direction, summarize, tables

SHOWN = {"toy": ("log_density", "spread"), "digits": ("utility", "diversity")}
"""Held-out evaluators in the figure; on `toy` the utility of every method is nearly the same function of the reward."""
CURVE_FRACTIONS = (0.03, 0.07, 0.13, 0.2, 0.3, 0.43, 0.65)
"""Fractions of a budget after which a run is evaluated for the figure."""
PAPER_ORDER = (
    ("leap_align", "drtune", "Table 2: 0.4092, 0.3882; SD3.5: 0.3915, 0.3828"),
    ("leap_align", "refl", "Table 2: 0.4092, 0.3852; SD3.5: 0.3915, 0.3833"),
    ("leap_align", "draft_lv", "Table 2: 0.4092, 0.3859; SD3.5: 0.3915, 0.3506"),
    ("drtune", "refl", "Table 2: 0.3882, 0.3852 (SD3.5 the other way: 0.3828, 0.3833)"),
    ("draft_lv", "refl", "Table 2: 0.3859, 0.3852 (SD3.5 the other way: 0.3506, 0.3833)"),
    ("drtune", "draft_lv", "Table 2: 0.3882, 0.3859; SD3.5: 0.3828, 0.3506"),
)
"""(better, worse, source): the paper's order by HPSv2.1 on FLUX, at equal iterations."""
BY = ("task", "hinge", "budget", "equal")  # a table for each combination

Runs = dict[tuple[str, str, str, str], list[RunMetrics]]  # (task, hinge, method, budget) -> a list over the seeds


def run(lab: Laboratory) -> None:
    """Runs every method with both hinges and both budgets, along each budget and to equal compute, and publishes."""
    budgets, rates = lab.scale.budgets, lab.learning_rates(tuple(METHODS), HINGES)
    evaluations = lab.evaluation_counts({method: method for method in METHODS})
    ends, settings = {}, {}
    for (budget, n), method in product(budgets.items(), METHODS):
        compute = round(n * evaluations["leap_align"] / evaluations[method])
        ends[budget, method] = {"samples": n, "compute": compute}
    for (task, hinge, method, budget), lr in rates.items():
        curve = (max(1, round(budgets[budget] * fraction)) for fraction in CURVE_FRACTIONS)
        stops = sorted({0, *curve, *ends[budget, method].values()})
        run = {"task": task, "method": method, "lr": lr, "evaluate_at": stops, "hyper": {"lam": HINGES[hinge]}}
        settings[task, hinge, method, budget] = run
    runs = lab.run_metrics(settings, "compare")
    seconds = lab.seconds_per_iteration([(task, m) for task in lab.scale.tasks for m in METHODS], min(budgets.values()))
    rows, curves = table_rows(runs, rates, ends, evaluations, seconds), curve_rows(runs)
    title = "### {task}, {hinge}, {budget} budget, equal {equal} (n = {n}, mean ± standard error)"
    text = tables(rows, BY, title, ["method", "lr", "iterations", "evaluators", "grad_norm", "seconds"])
    figure = plots.compare(rows, curves, SHOWN)
    lab.publish("compare", rows, text, figure, directions=directions(runs, lab.scale), curves=curves)


def table_rows(runs: Runs, rates: dict, ends: dict, evaluations: dict, seconds: dict) -> list[Row]:
    """The rows of all tables; the first row of each table is the model before training."""
    rows, begun = [], []
    for (task, hinge, method, budget), seed_runs in runs.items():
        for equal, n in ends[budget, method].items():
            table = dict(zip(BY, (task, hinge, budget, equal)))
            if table not in begun:
                begun.append(table)
                rows.append(table | {"method": "pretrained"} | summarize([run[0] for run in seed_runs], task))
            row = table | {"method": method, "lr": rates[task, hinge, method, budget], "iterations": n}
            row |= {"evaluations": round(n * evaluations[method]), "seconds": n * seconds[task, method]}
            rows.append(row | summarize([run[n] for run in seed_runs], task, "grad_norm"))
    return rows


def curve_rows(runs: Runs) -> list[Row]:
    """The metrics along the budgets: a row for each training curve and evaluated iteration of it."""
    return [
        {"task": task, "hinge": hinge, "budget": budget, "method": method, "iteration": n}
        | summarize([run[n] for run in seed_runs], task, "grad_norm")
        for (task, hinge, method, budget), seed_runs in runs.items()
        for n in sorted(seed_runs[0])
    ]


def directions(runs: Runs, scale: Scale) -> list[Row]:
    """The paper's order of the methods, by reward and by utility, with the hinge and at equal samples."""
    rows = []
    for task, (budget, n), metric in product(scale.tasks, scale.budgets.items(), ("reward", "utility")):
        values = {m: [run[n][metric] for run in runs[task, "hinge", m, budget]] for m in METHODS}
        for better, worse, source in PAPER_ORDER:
            claim, when = f"{better} > {worse}", f"{budget} budget"
            rows.append(direction(claim, source, task, metric, when, values[better], values[worse]))
    return rows
