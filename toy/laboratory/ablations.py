"""ablations: LeapAlign with one part replaced or removed, at LeapAlign's own learning rate."""

from itertools import product
from typing import Any, NamedTuple

from toy.laboratory import plots
from toy.laboratory.gradients import ALPHAS
from toy.laboratory.laboratory import Laboratory, RunMetrics, Scale
from toy.laboratory.tables import Row, direction, summarize, tables
from train_leap_align import Config


class Ablation(NamedTuple):
    """Options for one part of LeapAlign, and which of them does better in the paper."""

    options: dict[str, tuple[str, dict[str, Any]]]  # name -> method or variant, and changed hyperparameters
    expected: tuple[tuple[str, str, str], ...] = ()  # (metric, greater option, lesser option), the paper's choice first
    source: str = ""
    ema_decay: float = Config.ema_decay

    @property
    def reference(self) -> str:
        """The paper's choice, or the first option if the paper has none."""
        return self.expected[0][1] if self.expected else next(iter(self.options))


def options(name: str, values: dict[str, Any], method: str = "leap_align") -> dict[str, tuple[str, dict[str, Any]]]:
    """An option for each value of a hyperparameter."""
    return {option: (method, {name: value}) for option, value in values.items()}


def best(reference: str, *others: str) -> tuple[tuple[str, str, str], ...]:
    """The reference has a greater reward than each of the others."""
    return tuple(("reward", reference, other) for other in others)


LEAP_ALIGN = ("leap_align", {})
LAMBDAS = options("lam", {"-2": -2.0, "-1": -1.0, "0": 0.0, "1": 1.0, "none": None})
DISTANCES = {distance: (f"distance_{distance}", {}) for distance in ("1", "6", "12", "18")}
WEIGHTS = {"none": ("no_weight", {}), "d_j": ("weight_by_d_j", {}), "d_0": ("weight_by_d_0", {}), "both": LEAP_ALIGN}
LAMBDAS_EXPECTED = (("reward", "0", "-2"), ("utility", "0", "-2"), ("utility", "0", "none"))
NESTED = options("alpha", {"0": 0.0, "0.3": 0.3, "1": 1.0}, "nested_only")
NESTED_EXPECTED = (("reward", "0.3", "0"), ("reward", "0", "1"), ("grad_norm", "1", "0"), ("grad_norm", "1", "0.3"))
LEAPS = {"1": ("one_leap", {}), "2": LEAP_ALIGN, "3": ("three_leaps", {})}
ABLATIONS = {
    "alpha": Ablation(options("alpha", {f"{alpha:g}": alpha for alpha in ALPHAS}), best("0.3", "0", "1"), "Fig. 4"),
    "leaps": Ablation(LEAPS, best("2", "1", "3"), "Fig. 5"),
    "reward of": Ablation({"x̂_0": ("reward_on_leap", {}), "x_0": LEAP_ALIGN}, best("x_0", "x̂_0"), "Fig. 6"),
    "weight": Ablation(WEIGHTS, best("both", "none", "d_j", "d_0"), "Fig. 7"),
    "timesteps": Ablation(options("high", {"[0, 1/2]": 12, "[0, 1]": None}), best("[0, 1]", "[0, 1/2]"), "Fig. 8"),
    "k - j": Ablation(DISTANCES | {"random": LEAP_ALIGN}, best("random", *DISTANCES), "Fig. 9"),
    "nested only, alpha": Ablation(NESTED, NESTED_EXPECTED, "supplement's Fig. 2", ema_decay=0.0),
    "lambda": Ablation(LAMBDAS, LAMBDAS_EXPECTED, "supplement's Table 2"),
}

Runs = dict[tuple[str, str, str], list[RunMetrics]]  # (task, ablation, option) -> a list over the seeds


def run(lab: Laboratory) -> None:
    """Runs every option of every ablation at the learning rate of LeapAlign's large budget, and publishes."""
    stops, rates = list(lab.scale.ablation_iterations), lab.learning_rates(("leap_align",), {"hinge": 0.0})
    settings = {}
    for task, (name, ablation) in product(lab.scale.tasks, ABLATIONS.items()):
        shared = {"task": task, "lr": rates[task, "hinge", "leap_align", "large"], "evaluate_at": stops}
        for option, (method, hyper) in ablation.options.items():
            settings[task, name, option] = shared | {"method": method, "hyper": hyper, "ema_decay": ablation.ema_decay}
    runs = lab.run_metrics(settings, "ablations")
    rows = [
        {"task": task, "ablation": name, "option": option, "iterations": n}
        | summarize([run[n] for run in seed_runs], task, "grad_norm")
        for (task, name, option), seed_runs in runs.items()
        for n in stops
    ]
    blocks, columns = [], ["option", "iterations", "evaluators", "grad_norm"]
    for name, ablation in ABLATIONS.items():
        expected = "; ".join(f"{metric} at {greater} above {lesser}" for metric, greater, lesser in ablation.expected)
        blocks += [f"### {name}", *([f"Expected from the paper ({ablation.source}): {expected}."] if expected else [])]
        own = [row for row in rows if row["ablation"] == name]
        blocks.append(tables(own, ("task",), "{task}, n = {n}:", columns))
    figure = plots.ablations(rows, {name: ablation.reference for name, ablation in ABLATIONS.items()})
    lab.publish("ablations", rows, "\n\n".join(blocks), figure, directions=directions(runs, lab.scale))


def directions(runs: Runs, scale: Scale) -> list[Row]:
    """What the paper found in each ablation, after both numbers of iterations."""
    rows = []
    for name, ablation in ABLATIONS.items():
        for (metric, *pair), task, n in product(ablation.expected, scale.tasks, scale.ablation_iterations):
            values = ([run[n][metric] for run in runs[task, name, option]] for option in pair)
            claim = f"{name}: {' > '.join(pair)}"
            rows.append(direction(claim, ablation.source, task, metric, f"{n} iterations", *values))
    return rows
