"""beyond: every method, over the steps T, the solver and the budget: quality against velocity evaluations.

Each setting gets the learning rate with the best held-out utility on the tuning seeds, for either budget.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

from toy.laboratory import plots
from toy.laboratory.gradients import step_fidelity
from toy.laboratory.laboratory import Laboratory, Run, tuning_score
from toy.laboratory.other_trainers import TRAINERS
from toy.laboratory.result_cache import Settings
from toy.laboratory.tables import Row, summarize, tables
from toy.laboratory.train_run import T
from toy.summary import mean_and_error

COST = 29  # evaluations a sample of an iteration of the published LeapAlign: 25 steps, two of them with gradient
LEASHES = {"toy": 0.3, "digits": 3.0}  # beta, as `leash` found it
LEARNING_RATES = {"toy": (3e-4, 1e-3, 3e-3, 1e-2), "digits": (3e-4, 1e-3, 3e-3)}
LOW_LEARNING_RATES = LEARNING_RATES | {"digits": (1e-4, 3e-4, 1e-3)}  # of policy gradient
CURVE_FRACTIONS = {"small": (0, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1), "large": (1 / 3, 2 / 3, 1)}
"""Fractions of a budget after which a run is evaluated."""
PUBLISHED_FRACTIONS = tuple(i / 12 for i in range(1, 13))
"""The same for the large budget of the published setting, of which the best point counts."""
SHOWN = {"toy": ("utility", "log_density", "spread"), "digits": ("utility", "nearest_real", "diversity")}
FIDELITY = [("leap_align", ""), ("leap_align", "alpha 1")]  # (method, option), of which the gradient is measured
FIDELITY += [(name, "") for name in ("refl", "draft_lv", "drtune", "sparse", "bridge", "lagrange")]
FIDELITY += [("stratified", f"K {K}") for K in (2, 3, 4, 6, 8)]

Runs = dict[tuple["Setting", str], list[Run]]  # (setting, budget) -> a run a seed
Rates = dict[tuple["Setting", str], float]  # (setting, budget) -> learning rate
Curve = list[tuple[float, float]]  # (evaluations, utility) along a run


@dataclass(frozen=True)
class Setting:
    """What a row of the table trains with."""

    task: str
    method: str
    option: str  # a changed hyperparameter, `alpha 1` or `K 4`; `leash`, with K = 3; or nothing
    T: int
    solver: str = "euler"

    @property
    def hyper(self) -> dict[str, Any]:
        """The hyperparameters that differ from the method's own."""
        if self.option == "leash":
            return {"K": 3, "lam": None, "beta": LEASHES[self.task]}
        name, _, value = self.option.partition(" ")
        return {name: {"alpha": float, "K": int}[name](value)} if name else {}

    @property
    def line(self) -> str:
        """The method's name in the figure; with a leash it is another line."""
        return f"{self.method}, leash" if self.option == "leash" else self.method

    @property
    def is_published(self) -> bool:
        """Whether it is the paper's own: T = 25, alpha = 0.3, Euler."""
        return self == Setting(self.task, "leap_align", "", 25)

    def run(self, lr: float, evaluate_at: list[int]) -> Settings:
        """The arguments of train_run apart from the seed."""
        own = {"task": self.task, "method": self.method, "T": self.T, "hyper": self.hyper | {"solver": self.solver}}
        return own | {"lr": lr, "evaluate_at": evaluate_at, "unit": "evaluations"}


def settings_of(task: str, samplers: tuple[tuple[int, str], ...]) -> Iterator[Setting]:
    """All settings of a task."""
    methods = [("leap_align", ""), ("leap_align", "alpha 1"), ("stratified", "K 3")]
    methods += [(name, "") for name in ("refl", "draft_lv", "drtune", "full_backprop", "sparse", "bridge", "lagrange")]
    for method, sampler in product(methods, samplers):
        yield Setting(task, *method, *sampler)
    others = (("dancegrpo", ""), ("mixgrpo", ""), ("stratified", "leash"))
    for (method, option), steps in product(others, (8, 25)):
        yield Setting(task, method, option, steps)


def run(lab: Laboratory) -> None:
    """Tunes, trains and measures gradients, and publishes."""
    settings = [setting for task in lab.scale.tasks for setting in settings_of(task, lab.scale.samplers)]
    rates = learning_rates(lab, settings)
    runs, chosen = training_runs(lab, settings, rates), chosen_settings(lab, settings, rates)
    published = {s.task: s for s in settings if s.is_published}
    rows, curves = table_rows(runs, rates, published), curve_rows(runs, [*published.values(), *chosen])
    others = {"headline": headline_rows(rows, chosen), "fidelity": gradient_rows(lab), "curves": curves}
    setting, shares = ["method", "option", "T", "solver", "lr"], ["needed", "share", "share_alike", "share_of_best"]
    title = "### {task}, {budget} budget (n = {n}, mean ± standard error)"
    columns = ["task", "method", "evaluations", "batch_size", "cosine", "ratio", "one_cosine", "step_cosine"]
    blocks = [
        tables(others["headline"], (), "### Evaluations to the published utility", ["task", *setting, *shares]),
        tables(rows, ("task", "budget"), title, [*setting, "evaluations", "evaluators"]),
        tables(others["fidelity"], (), "### Gradients, T = 25, before training", columns),
    ]
    figure = plots.beyond(curves, SHOWN, lab.scale.budgets["small"] * COST)
    lab.publish("beyond", rows, "\n\n".join(blocks), figure, **others)


def learning_rates(lab: Laboratory, settings: list[Setting]) -> Rates:
    """The learning rate of each setting and budget with the highest mean utility on the tuning seeds.

    Both solvers share it: their iterations cost the same and train on nearly the same states.
    """
    best, euler = {}, [setting for setting in settings if setting.solver == "euler"]
    for budget, end in lab.scale.budgets.items():
        ends = sorted({n * COST for n in lab.scale.budgets.values() if n <= end})
        tried = {(s, lr): s.run(lr, ends) for s in euler for lr in candidate_rates(lab, s)}
        seeds = lab.scale.tuning_seeds if budget == "large" else lab.scale.more_tuning_seeds
        runs = lab.train_runs(tried, f"learning rates, {budget} budget", seeds)
        for setting in settings:
            tuned = replace(setting, solver="euler")
            scores = {lr: tuning_score(runs[tuned, lr], "utility") for lr in candidate_rates(lab, tuned)}
            best[setting, budget] = max(scores, key=scores.get)
    return best


def candidate_rates(lab: Laboratory, setting: Setting) -> tuple[float, ...]:
    """The learning rates to choose from."""
    if lab.scale.smoke:
        return lab.scale.learning_rates
    return (LOW_LEARNING_RATES if setting.method in TRAINERS else LEARNING_RATES)[setting.task]


def training_runs(lab: Laboratory, settings: list[Setting], rates: Rates) -> Runs:
    """The runs of the tables: for each budget with the rate chosen for it, evaluated along it."""
    planned = {}
    for setting, (budget, n) in product(settings, lab.scale.budgets.items()):
        is_target = setting.is_published and budget == "large"
        fractions = PUBLISHED_FRACTIONS if is_target else CURVE_FRACTIONS[budget]
        points = [round(n * COST * fraction) for fraction in fractions]
        planned[setting, budget] = setting.run(rates[setting, budget], points)
    return lab.train_runs(planned, "beyond", lab.scale.seeds)


def chosen_settings(lab: Laboratory, settings: list[Setting], rates: Rates) -> list[Setting]:
    """The setting of each task and method with the highest utility at the small budget on the tuning seeds."""
    end, lines = lab.scale.budgets["small"] * COST, {}
    planned = {setting: setting.run(rates[setting, "small"], [end]) for setting in settings}
    runs = lab.train_runs(planned, "choice of settings", lab.scale.more_tuning_seeds)
    for setting in settings:
        lines.setdefault((setting.task, setting.line), []).append(setting)
    return [max(line, key=lambda setting: tuning_score(runs[setting], "utility")) for line in lines.values()]


def table_rows(runs: Runs, rates: Rates, published: dict[str, Setting]) -> list[Row]:
    """The metrics of each setting at the end of each budget, n = 0 if a run broke; `cost_to_reach` of the small one."""
    rows = []
    for (setting, budget), seed_runs in runs.items():
        row = vars(setting) | {"budget": budget, "lr": rates[setting, budget], "n": 0}
        if not any(run["error"] for run in seed_runs):
            row |= summarize([run["metrics"][-1] for run in seed_runs], setting.task, "evaluations", "iterations")
            if budget == "small":
                row |= cost_to_reach(seed_runs, runs[published[setting.task], "large"])
        rows.append(row)
    return rows


def headline_rows(rows: list[Row], chosen: list[Setting]) -> list[Row]:
    """For each task and method, what the chosen setting needs to reach the published utility of the large budget."""
    shown = (*vars(chosen[0]), "lr", "needed", "share", "share_alike", "share_of_best")
    small = {Setting(*(row[name] for name in vars(chosen[0]))): row for row in rows if row["budget"] == "small"}
    return [{k: v for k, v in small[setting].items() if k.removesuffix("_error") in shown} for setting in chosen]


def curve_rows(runs: Runs, settings: list[Setting]) -> list[Row]:
    """The metrics along both budgets of some settings."""
    return [
        vars(s) | {"line": s.line, "budget": budget} | summarize(list(metrics), s.task, "evaluations", "iterations")
        for s, budget in product(settings, CURVE_FRACTIONS)
        for metrics in zip(*(run["metrics"] for run in runs[s, budget]))
    ]


def gradient_rows(lab: Laboratory) -> list[Row]:
    """The gradient of each method compared with the true one: its expectation, and a step of equal cost."""
    shared = {"T": T, "cost": COST * 64, "draws": lab.scale.max_draws // 3, "batch_size": lab.scale.batch_size}
    settings = {}
    for task, (method, option) in product(lab.scale.tasks, FIDELITY):
        own = {"task": task, "method": method, "hyper": Setting(task, method, option, T).hyper}
        settings[task, f"{method}, {option}" if option else method] = shared | own
    results = lab.results(step_fidelity, settings, "gradients")
    return [{"task": task, "method": name} | result for (task, name), result in results.items()]


# Evaluations to the published utility


def cost_to_reach(runs: list[Run], published: list[Run]) -> dict[str, float]:
    """What the runs need for the mean utility of the published runs: see `shares`; nothing if they never reach it.

    The errors are the jackknife's: all means without one seed after the other; none if some never reach it.
    """
    curves = [(mean_curve(runs, left_out), mean_curve(published, left_out)) for left_out in (None, *range(len(runs)))]
    (of_all, *of_others), row = [shares(*pair) for pair in curves], {}
    for name, value in of_all.items():
        row[name], others = value, [of_other.get(name) for of_other in of_others]
        if None not in others:
            n, mean = len(others), sum(others) / len(others)
            row[f"{name}_error"] = math.sqrt((n - 1) / n * sum((other - mean) ** 2 for other in others))
    return row


def mean_curve(runs: list[Run], left_out: int | None) -> Curve:
    """Evaluations and utility along the runs, means over all seeds but one."""
    points = zip(*(run["metrics"] for seed, run in enumerate(runs) if seed != left_out))
    return [tuple(mean_and_error([m[name] for m in p])[0] for name in ("evaluations", "utility")) for p in points]


def shares(curve: Curve, published: Curve) -> dict[str, float]:
    """needed: evaluations to the utility that the published runs have at their end.  What is never reached is left out.

    share: needed over theirs.  share_alike: over those with which they first have this utility, for it may fall again.
    share_of_best: evaluations to their best utility, over theirs to it.
    """
    (end, utility), (to_best, best), found = published[-1], max(published, key=lambda point: point[1]), {}
    if (needed := evaluations_to(utility, curve)) is not None:
        found |= {"needed": needed, "share": needed / end, "share_alike": needed / evaluations_to(utility, published)}
    if (needed_for_best := evaluations_to(best, curve)) is not None:
        found["share_of_best"] = needed_for_best / to_best
    return found


def evaluations_to(utility: float, curve: Curve) -> float | None:
    """Where a curve first reaches this utility, interpolated between two of its points."""
    if curve[0][1] >= utility:
        return curve[0][0]
    for (x, y), (x_next, y_next) in pairwise(curve):
        if y_next >= utility:
            return x + (utility - y) / (y_next - y) * (x_next - x)
    return None
