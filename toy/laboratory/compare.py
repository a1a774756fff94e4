"""compare: every method at its best learning rate, at equal samples and at equal compute."""

from leap_align import METHODS
from runtime.run_dir import write_csv
from toy.laboratory import plots
from toy.laboratory.laboratory import EVALUATORS, HINGES, Laboratory, RunMetrics, Scale
from toy.laboratory.tables import Direction, summarize
from toy.summary import markdown_table

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

Runs = dict[tuple[str, str, str, str], list[RunMetrics]]
"""(task, hinge, method, budget) -> the metrics of its runs, a list over the seeds."""


def run(lab: Laboratory) -> None:
    """Runs every method with both hinges and both budgets, and writes the tables and the figure."""
    budgets = lab.scale.budgets
    learning_rates = lab.learning_rates(tuple(METHODS), HINGES)
    evaluations = dict(zip(METHODS, lab.evaluation_counts([{"method": method} for method in METHODS])))
    iterations = {
        (budget, method): {"samples": n, "compute": round(n * evaluations["leap_align"] / evaluations[method])}
        for budget, n in budgets.items()
        for method in METHODS
    }
    runs = training_runs(lab, learning_rates, iterations)
    keys = [(task, method) for task in lab.scale.tasks for method in METHODS]
    seconds = lab.seconds_per_iteration(keys, min(budgets.values()))
    rows = table_rows(runs, learning_rates, iterations, evaluations, seconds)
    text = "\n\n".join(table(rows, key) for key in dict.fromkeys(table_key(row) for row in rows))
    lab.publish("compare", rows, text, directions(runs, lab.scale))
    curves = curve_rows(runs)
    write_csv(lab.out / "compare-curves.csv", curves)
    plots.compare(lab.out / "compare.png", curves, SHOWN)


def training_runs(
    lab: Laboratory, learning_rates: dict[tuple, float], iterations: dict[tuple[str, str], dict[str, int]]
) -> Runs:
    """Runs that are evaluated along each budget, and where they have used equal samples and equal compute."""
    settings = {}
    for (task, hinge, method, budget), lr in learning_rates.items():
        curve = [max(1, round(lab.scale.budgets[budget] * fraction)) for fraction in CURVE_FRACTIONS]
        settings[task, hinge, method, budget] = {
            "task": task,
            "method": method,
            "lr": lr,
            "evaluate_at": sorted({0, *curve, *iterations[budget, method].values()}),
            "hyper": {"lam": HINGES[hinge]},
        }
    return lab.run_metrics(settings, "compare")


def table_rows(
    runs: Runs,
    learning_rates: dict[tuple, float],
    iterations: dict[tuple[str, str], dict[str, int]],
    evaluations: dict[str, float],
    seconds: dict[tuple[str, str], float],
) -> list[dict]:
    """The rows of all tables; the first row of each table is the model before training."""
    rows, tables = [], []
    for (task, hinge, method, budget), seed_runs in runs.items():
        for equal, iteration in iterations[budget, method].items():
            key = {"task": task, "hinge": hinge, "budget": budget, "equal": equal}
            if key not in tables:
                tables.append(key)
                before = [{name: run[0][name] for name in EVALUATORS[task]} for run in seed_runs]
                rows.append(key | {"method": "pretrained"} | summarize(before))
            cost = {
                "iterations": iteration,
                "evaluations": round(iteration * evaluations[method]),
                "seconds": iteration * seconds[task, method],
            }
            row = key | {"method": method, "lr": learning_rates[task, hinge, method, budget]} | cost
            rows.append(row | summarize([run[iteration] for run in seed_runs]))
    return rows


def curve_rows(runs: Runs) -> list[dict]:
    """The metrics along the large budget: a row for each training curve and evaluated iteration."""
    return [
        {"task": task, "hinge": hinge, "method": method, "iteration": iteration}
        | summarize([run[iteration] for run in seed_runs])
        for (task, hinge, method, budget), seed_runs in runs.items()
        if budget == "large"
        for iteration in sorted(seed_runs[0])
    ]


def table_key(row: dict) -> tuple[str, str, str, str]:
    """The table to which a row belongs."""
    return row["task"], row["hinge"], row["budget"], row["equal"]


def table(rows: list[dict], key: tuple[str, str, str, str]) -> str:
    """One table of the comparison, with its title."""
    task, hinge, budget, equal = key
    table_rows = [row for row in rows if table_key(row) == key]
    columns = ["method", "lr", "iterations", *EVALUATORS[task], "grad_norm", "seconds"]
    n = f"n = {table_rows[0]['n']}, mean ± standard error"
    return f"### {task}, {hinge}, {budget} budget, equal {equal} ({n})\n\n{markdown_table(table_rows, columns)}"


def directions(runs: Runs, scale: Scale) -> list[Direction]:
    """The paper's order of the methods, by reward and by utility, with the hinge and at equal samples."""
    result = []
    for task in scale.tasks:
        for budget, iteration in scale.budgets.items():
            for metric in ("reward", "utility"):
                values = {m: [run[iteration][metric] for run in runs[task, "hinge", m, budget]] for m in METHODS}
                for better, worse, source in PAPER_ORDER:
                    claim, when = f"{better} > {worse}", f"{budget} budget"
                    result.append(Direction(claim, source, task, metric, when, values[better], values[worse]))
    return result
