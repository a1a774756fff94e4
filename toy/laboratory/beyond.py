"""beyond: every method, over the steps T, the solver and the budget: quality against velocity evaluations.

Each setting gets the learning rate with the best held-out utility on the tuning seeds, for either budget.  The steps of
an evaluation are 25 whatever a run trains on.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

from beyond import SOLVERS
from runtime.run_dir import write_csv
from toy.laboratory import plots
from toy.laboratory.gradients import step_fidelity
from toy.laboratory.laboratory import EVALUATORS, Laboratory, Settings, T
from toy.laboratory.other_trainers import TRAINERS
from toy.laboratory.tables import summarize
from toy.laboratory.train_run import budget_run
from toy.summary import markdown_table, mean_and_error

COST = 29
"""Evaluations a sample of an iteration of the published LeapAlign: 25 steps, two of them with gradient."""
LEASHES = {"toy": 0.3, "digits": 3.0}
"""beta, as `leash` found it."""
LEARNING_RATES = {"toy": (3e-4, 1e-3, 3e-3, 1e-2), "digits": (3e-4, 1e-3, 3e-3)}
LOW_LEARNING_RATES = {"toy": (3e-4, 1e-3, 3e-3, 1e-2), "digits": (1e-4, 3e-4, 1e-3)}
"""Of policy gradient and replay."""
MORE_TUNING_SEEDS = tuple(range(100, 106))
CURVE_FRACTIONS = {"small": (0, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1), "large": (1 / 3, 2 / 3, 1)}
"""Fractions of a budget after which a run is evaluated."""
PUBLISHED_FRACTIONS = tuple(i / 12 for i in range(1, 13))
"""The same for the large budget of the published setting, of which the best point counts."""
SHOWN = {"toy": ("utility", "log_density", "spread"), "digits": ("utility", "nearest_real", "diversity")}
"""Held-out evaluators in the figure."""
FIDELITY: dict[str, tuple[str, dict[str, Any]]] = {
    "leap_align": ("leap_align", {}),
    "leap_align, alpha 1": ("leap_align", {"alpha": 1.0}),
    **{name: (name, {}) for name in ("refl", "draft_lv", "drtune", "sparse", "bridge", "lagrange")},
    **{f"stratified, K {K}": ("stratified", {"K": K}) for K in (2, 3, 4, 6, 8)},
}
"""Methods and hyperparameters of which the gradient is compared with the true one."""

Runs = dict[tuple["Setting", str], list[dict[str, Any]]]
"""(setting, budget) -> for each seed what budget_run returned."""
Rates = dict[tuple["Setting", str], float]
"""(setting, budget) -> its learning rate."""


@dataclass(frozen=True)
class Setting:
    """What a row of the table trains with."""

    task: str
    method: str
    option: str
    """A changed hyperparameter, `alpha 1` or `K 4`; `leash`, with K = 3; or nothing."""
    T: int
    solver: str = "euler"

    @property
    def hyper(self) -> dict[str, Any]:
        """The hyperparameters that differ from the method's own."""
        if self.option == "leash":
            return {"K": 3, "lam": None, "beta": LEASHES[self.task], "solver": self.solver}
        name, _, value = self.option.partition(" ")
        changed = {"alpha": float, "K": int}
        return {"solver": self.solver} | ({name: changed[name](value)} if name else {})

    @property
    def line(self) -> str:
        """The method's name in the figure; a leash makes it another one."""
        return f"{self.method}, leash" if self.option == "leash" else self.method

    @property
    def is_published(self) -> bool:
        """Whether it is the paper's own: T = 25, alpha = 0.3, Euler."""
        return (self.method, self.option, self.T, self.solver) == ("leap_align", "", 25, "euler")


def settings_of(task: str, step_counts: tuple[int, ...]) -> Iterator[Setting]:
    """All settings of a task."""
    methods = [("leap_align", ""), ("leap_align", "alpha 1"), *(("stratified", f"K {K}") for K in (2, 3, 4))]
    methods += [(name, "") for name in ("refl", "draft_lv", "drtune", "full_backprop", "sparse", "bridge", "lagrange")]
    for (method, option), steps, solver in product(methods, step_counts, SOLVERS):
        yield Setting(task, method, option, steps, solver)
    others = (("dancegrpo", ""), ("mixgrpo", ""), ("replay", "alpha 1"), ("stratified", "leash"))
    for (method, option), steps in product(others, (8, 25)):
        yield Setting(task, method, option, steps)


def run(lab: Laboratory) -> None:
    """Tunes, trains and measures gradients, and writes the tables and the figure."""
    settings = [setting for task in lab.scale.tasks for setting in settings_of(task, lab.scale.training_step_counts)]
    rates = learning_rates(lab, settings)
    runs, chosen = training_runs(lab, settings, rates), chosen_settings(lab, settings, rates)
    published = {s.task: s for s in settings if s.is_published}
    rows, curves = table_rows(runs, rates, published), curve_rows(runs, [*published.values(), *chosen])
    headline, gradients = headline_rows(runs, rates, chosen, published), gradient_rows(lab)
    for name, table in {"headline": headline, "fidelity": gradients, "curves": curves}.items():
        write_csv(lab.out / f"beyond-{name}.csv", table)
    lab.publish("beyond", rows, tables(rows, headline, gradients))
    plots.beyond(lab.out / "beyond.png", curves, SHOWN, lab.scale.budgets["small"] * COST)


# ---------------------------------------------------------------------------------------------------------------------
# Training runs
# ---------------------------------------------------------------------------------------------------------------------


def run_settings(setting: Setting, lr: float, budgets: list[int]) -> Settings:
    """The arguments of budget_run apart from the seed."""
    own = {"task": setting.task, "method": setting.method, "T": setting.T, "hyper": setting.hyper}
    return own | {"lr": lr, "budgets": budgets}


def learning_rates(lab: Laboratory, settings: list[Setting]) -> Rates:
    """The learning rate of each setting and budget with the highest mean utility on the tuning seeds.

    Both solvers share it: their iterations cost the same and train on nearly the same states.
    """
    best, euler = {}, [setting for setting in settings if setting.solver == "euler"]
    for budget, end in lab.scale.budgets.items():
        ends = sorted({n * COST for n in lab.scale.budgets.values() if n <= end})
        tried = {(s, lr): run_settings(s, lr, ends) for s in euler for lr in candidate_rates(lab, s)}
        runs = lab.train_runs(tried, tuning_seeds(lab, budget), f"learning rates, {budget} budget", budget_run)
        for setting in settings:
            tuned = replace(setting, solver="euler")
            utility = {lr: mean_utility(runs[tuned, lr]) for lr in candidate_rates(lab, tuned)}
            best[setting, budget] = max(utility, key=utility.get)
    return best


def tuning_seeds(lab: Laboratory, budget: str) -> tuple[int, ...]:
    """Seeds that choose, of which no table has any.  The small budget's short runs vary more, and cost less."""
    return lab.scale.tuning_seeds if lab.scale.smoke or budget == "large" else MORE_TUNING_SEEDS


def candidate_rates(lab: Laboratory, setting: Setting) -> tuple[float, ...]:
    """The learning rates to choose from."""
    if lab.scale.smoke:
        return lab.scale.learning_rates
    return (LOW_LEARNING_RATES if setting.method in TRAINERS else LEARNING_RATES)[setting.task]


def mean_utility(runs: list[dict[str, Any]]) -> float:
    """The mean utility at the end of tuning runs; a run that broke counts as worse than any other."""
    return mean_and_error([-1e9 if run["error"] else run["metrics"][-1]["utility"] for run in runs])[0]


def training_runs(lab: Laboratory, settings: list[Setting], rates: Rates) -> Runs:
    """The runs of the tables: for each budget with the rate chosen for it, evaluated along it."""
    planned = {}
    for setting, (budget, n) in product(settings, lab.scale.budgets.items()):
        is_target = setting.is_published and budget == "large"
        fractions = PUBLISHED_FRACTIONS if is_target else CURVE_FRACTIONS[budget]
        points = [round(n * COST * fraction) for fraction in fractions]
        planned[setting, budget] = run_settings(setting, rates[setting, budget], points)
    return lab.train_runs(planned, lab.scale.seeds, "beyond", budget_run)


def chosen_settings(lab: Laboratory, settings: list[Setting], rates: Rates) -> list[Setting]:
    """The setting of each task and method with the highest utility at the small budget on the tuning seeds."""
    end = lab.scale.budgets["small"] * COST
    planned = {setting: run_settings(setting, rates[setting, "small"], [end]) for setting in settings}
    runs, best = lab.train_runs(planned, tuning_seeds(lab, "small"), "choice of settings", budget_run), {}
    for setting in settings:
        utility, key = mean_utility(runs[setting]), (setting.task, setting.line)
        if key not in best or utility > best[key][0]:
            best[key] = utility, setting
    return [setting for _, setting in best.values()]


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


def table_rows(runs: Runs, rates: Rates, published: dict[str, Setting]) -> list[dict[str, Any]]:
    """The metrics of each setting at the end of each budget; no metrics and n = 0 if a run of it broke.

    Rows of the small budget also have what `cost_to_reach` returns.
    """
    rows = []
    for (setting, budget), seed_runs in runs.items():
        row = vars(setting) | {"budget": budget, "lr": rates[setting, budget], "n": 0}
        if not any(run["error"] for run in seed_runs):
            row |= summarize([run["metrics"][-1] for run in seed_runs])
            if budget == "small":
                row |= cost_to_reach(seed_runs, runs[published[setting.task], "large"])
        rows.append(row)
    return rows


def cost_to_reach(runs: list[dict[str, Any]], published: list[dict[str, Any]]) -> dict[str, float]:
    """What the runs need for the mean utility of the published runs: see `shares`.

    The errors are the jackknife's: all means without one seed after the other.  Nothing if the mean of all seeds never
    reaches that utility, and no error if the means of some never do.
    """
    curves = [(mean_curve(runs, left_out), mean_curve(published, left_out)) for left_out in (None, *range(len(runs)))]
    of_all, *of_others = (shares(*pair) for pair in curves)
    row = {}
    for name, value in of_all.items():
        others = [of_other.get(name) for of_other in of_others]
        row[name] = value
        if None not in others:
            n, mean = len(others), sum(others) / len(others)
            row[f"{name}_error"] = math.sqrt((n - 1) / n * sum((other - mean) ** 2 for other in others))
    return row


def mean_curve(runs: list[dict[str, Any]], left_out: int | None) -> list[tuple[float, float]]:
    """Evaluations and utility along the runs, means over all seeds but one."""
    points = zip(*(run["metrics"] for seed, run in enumerate(runs) if seed != left_out))
    means = [[mean_and_error([m[name] for m in point])[0] for name in ("evaluations", "utility")] for point in points]
    return [(evaluations, utility) for evaluations, utility in means]


def shares(curve: list[tuple[float, float]], published: list[tuple[float, float]]) -> dict[str, float]:
    """needed: evaluations to the utility that the published runs have at their end.  Without what is never reached.

    share: needed over theirs.  share_alike: over those with which they first have this utility, for it may fall again.
    share_of_best: evaluations to their best utility, over theirs to it.
    """
    (end, utility), (to_best, best) = published[-1], max(published, key=lambda point: point[1])
    needed, needed_for_best = evaluations_to(utility, curve), evaluations_to(best, curve)
    found = {}
    if needed is not None:
        found |= {"needed": needed, "share": needed / end, "share_alike": needed / evaluations_to(utility, published)}
    if needed_for_best is not None:
        found["share_of_best"] = needed_for_best / to_best
    return found


def evaluations_to(utility: float, curve: list[tuple[float, float]]) -> float | None:
    """Where a curve first reaches this utility, interpolated between two of its points."""
    if curve[0][1] >= utility:
        return curve[0][0]
    for (x, y), (x_next, y_next) in pairwise(curve):
        if y_next >= utility:
            return x + (utility - y) / (y_next - y) * (x_next - x)
    return None


def headline_rows(runs: Runs, rates: Rates, chosen: list[Setting], published: dict[str, Setting]) -> list[dict]:
    """For each task and method, what the chosen setting needs to reach the published utility of the large budget."""
    return [
        vars(s) | {"lr": rates[s, "small"]} | cost_to_reach(runs[s, "small"], runs[published[s.task], "large"])
        for s in chosen
    ]


def curve_rows(runs: Runs, settings: list[Setting]) -> list[dict[str, Any]]:
    """The metrics along both budgets of some settings."""
    rows = []
    for setting, budget in product(settings, CURVE_FRACTIONS):
        metrics = [run["metrics"] for run in runs[setting, budget]]
        for values in zip(*metrics):
            rows.append(vars(setting) | {"line": setting.line, "budget": budget} | summarize(list(values)))
    return rows


def gradient_rows(lab: Laboratory) -> list[dict[str, Any]]:
    """The gradient of each method compared with the true one: its expectation, and a step of equal cost."""
    scale = lab.scale
    shared = {"T": T, "cost": COST * 64, "draws": scale.max_draws // 3, "batch_size": scale.batch_size}
    keys = list(product(scale.tasks, FIDELITY))
    settings = [
        shared | {"task": task, "method": FIDELITY[name][0], "hyper": FIDELITY[name][1], "smoke": scale.smoke}
        for task, name in keys
    ]
    results = lab.cache.results(step_fidelity, settings, "gradients")
    return [{"task": task, "method": name} | result for (task, name), result in zip(keys, results)]


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def tables(rows: list[dict], headline: list[dict], gradients: list[dict]) -> str:
    """Tables of the headline, of all settings for each task and budget, and of the gradients."""
    columns = ["task", "method", "option", "T", "solver", "lr", "needed"]
    columns += ["share", "share_alike", "share_of_best"]
    blocks = ["### Evaluations to the published utility", markdown_table(headline, columns)]
    for task, budget in dict.fromkeys((row["task"], row["budget"]) for row in rows):
        table = [row for row in rows if (row["task"], row["budget"]) == (task, budget)]
        columns = ["method", "option", "T", "solver", "lr", "evaluations", *EVALUATORS[task]]
        n = max(row["n"] for row in table)
        blocks.append(f"### {task}, {budget} budget (n = {n}, mean ± standard error)")
        blocks.append(markdown_table(table, columns))
    columns = ["task", "method", "evaluations", "batch_size", "cosine", "ratio", "one_cosine", "step_cosine"]
    return "\n\n".join([*blocks, "### Gradients, T = 25, before training", markdown_table(gradients, columns)])
