"""beyond: later methods beside the paper's, over the steps T and the solver: quality against velocity evaluations.

Each setting gets the learning rate with the best held-out utility on the tuning seeds.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
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
LEARNING_RATES = {"toy": (3e-4, 1e-3, 3e-3, 1e-2), "digits": (3e-4, 1e-3, 3e-3)}
LOW_LEARNING_RATES = LEARNING_RATES | {"digits": (1e-4, 3e-4, 1e-3)}  # of policy gradient
CURVE_FRACTIONS = tuple(i / 10 for i in range(11))  # of the budget, after which a run is evaluated
SHOWN = {"toy": ("utility", "log_density", "spread"), "digits": ("utility", "nearest_real", "diversity")}
FIDELITY = [("leap_align", ""), ("leap_align", "alpha 1")]  # (method, option), of which the gradient is measured
FIDELITY += [(name, "") for name in ("refl", "draft_lv", "drtune", "sparse", "bridge", "lagrange")]
FIDELITY += [("stratified", f"K {K}") for K in (2, 3, 4, 6, 8)]

Runs = dict["Setting", list[Run]]  # a run a seed
Curve = list[tuple[float, float]]  # (evaluations, utility) along a run


@dataclass(frozen=True)
class Setting:
    """What a row of the table trains with."""

    task: str
    method: str
    option: str  # a changed hyperparameter, `alpha 1` or `K 4`, or nothing
    T: int
    solver: str = "euler"

    @property
    def hyper(self) -> dict[str, Any]:
        """The hyperparameters that differ from the method's own."""
        name, _, value = self.option.partition(" ")
        return {name: {"alpha": float, "K": int}[name](value)} if name else {}

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
    for method, steps in product(("dancegrpo", "mixgrpo"), (8, 25)):
        yield Setting(task, method, "", steps)


def run(lab: Laboratory) -> None:
    """Tunes, trains and measures gradients, and publishes."""
    settings = [setting for task in lab.scale.tasks for setting in settings_of(task, lab.scale.samplers)]
    rates, chosen = tune(lab, settings)
    points = [round(fraction * COST * lab.scale.beyond_iterations) for fraction in CURVE_FRACTIONS]
    runs = lab.train_runs({s: s.run(rates[s], points) for s in settings}, "beyond", lab.scale.seeds)
    published = {s.task: s for s in settings if s.is_published}
    rows = table_rows(runs, rates, published)
    others = {"headline": [row for s, row in zip(runs, rows) if s in chosen], "fidelity": gradient_rows(lab)}
    others["curves"] = curve_rows(runs, list(dict.fromkeys([*published.values(), *chosen])))
    setting, title = ["method", "option", "T", "solver", "lr"], "### {task} (n = {n}, mean ± standard error)"
    columns = ["task", "method", "evaluations", "batch_size", "cosine", "ratio", "one_cosine", "step_cosine"]
    blocks = [
        tables(others["headline"], (), "### The best setting of each method", ["task", *setting, "utility", "share"]),
        tables(rows, ("task",), title, [*setting, "evaluations", "share", "evaluators"]),
        tables(others["fidelity"], (), "### Gradients, T = 25, before training", columns),
    ]
    lab.publish("beyond", rows, "\n\n".join(blocks), plots.beyond(others["curves"], SHOWN), **others)


def tune(lab: Laboratory, settings: list[Setting]) -> tuple[dict[Setting, float], list[Setting]]:
    """The learning rate of each setting, and the best setting of each task and method, by the tuning seeds' utility."""
    end, best = [COST * lab.scale.beyond_iterations], {}
    tried = {(s, lr): s.run(lr, end) for s in settings for lr in candidate_rates(lab, s)}
    runs = lab.train_runs(tried, "learning rates", lab.scale.more_tuning_seeds)
    scores = {key: tuning_score(seed_runs, "utility") for key, seed_runs in runs.items()}
    rates = {s: max(candidate_rates(lab, s), key=lambda lr: scores[s, lr]) for s in settings}
    for s in sorted(settings, key=lambda s: scores[s, rates[s]]):
        best[s.task, s.method] = s  # the last one is the best
    return rates, [s for s in settings if s in best.values()]


def candidate_rates(lab: Laboratory, setting: Setting) -> tuple[float, ...]:
    """The learning rates to choose from."""
    if lab.scale.smoke:
        return lab.scale.learning_rates
    return (LOW_LEARNING_RATES if setting.method in TRAINERS else LEARNING_RATES)[setting.task]


def table_rows(runs: Runs, rates: dict[Setting, float], published: dict[str, Setting]) -> list[Row]:
    """The metrics of each setting at the end, n = 0 if a run broke, and `share` (cost_to_reach)."""
    rows = []
    for setting, seed_runs in runs.items():
        row = vars(setting) | {"lr": rates[setting], "n": 0}
        if not any(run["error"] for run in seed_runs):
            row |= summarize([run["metrics"][-1] for run in seed_runs], setting.task, "evaluations", "iterations")
            row |= cost_to_reach(seed_runs, runs[published[setting.task]])
        rows.append(row)
    return rows


def curve_rows(runs: Runs, settings: list[Setting]) -> list[Row]:
    """The metrics along the runs of some settings."""
    return [
        vars(s) | summarize(list(metrics), s.task, "evaluations", "iterations")
        for s in settings
        for metrics in zip(*(run["metrics"] for run in runs[s]))
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
    """`share`: the evaluations with which the mean utility reaches that of the published runs' end, over theirs.

    Its error is the jackknife's: all means without one seed after the other; none if some never reach it.  {} if it is
    never reached.
    """
    found = [share(mean_curve(runs, seed), mean_curve(published, seed)) for seed in (None, *range(len(runs)))]
    of_all, *others = found
    if of_all is None:
        return {}
    if None in others:
        return {"share": of_all}
    n, mean = len(others), sum(others) / len(others)
    error = math.sqrt((n - 1) / n * sum((other - mean) ** 2 for other in others))
    return {"share": of_all, "share_error": error}


def mean_curve(runs: list[Run], left_out: int | None) -> Curve:
    """Evaluations and utility along the runs, means over all seeds but one."""
    points = zip(*(run["metrics"] for seed, run in enumerate(runs) if seed != left_out))
    return [tuple(mean_and_error([m[name] for m in p])[0] for name in ("evaluations", "utility")) for p in points]


def share(curve: Curve, published: Curve) -> float | None:
    """Where a curve first reaches the utility of the published curve's end, over that end; interpolated."""
    end, utility = published[-1]
    if curve[0][1] >= utility:
        return curve[0][0] / end
    for (x, y), (x_next, y_next) in pairwise(curve):
        if y_next >= utility:
            return (x + (utility - y) / (y_next - y) * (x_next - x)) / end
    return None
