"""ablations: LeapAlign with one part replaced or removed, at LeapAlign's own learning rate."""

from dataclasses import dataclass
from itertools import product
from typing import Any

from toy.laboratory import plots
from toy.laboratory.gradients import ALPHAS
from toy.laboratory.laboratory import EVALUATORS, Laboratory, RunMetrics, Scale
from toy.laboratory.tables import Direction, summarize
from toy.summary import markdown_table


@dataclass(frozen=True)
class Ablation:
    """Options for one part of LeapAlign, and which of them does better in the paper."""

    options: dict[str, tuple[str, dict[str, Any]]]
    """Name -> method or variant, and changed hyperparameters."""
    expected: tuple[tuple[str, str, str], ...] = ()
    """(metric, option with the greater value, option with the lesser value), as the paper reports.

    The first greater option is the paper's choice.
    """
    source: str = ""
    ema_decay: float = 0.99

    @property
    def reference(self) -> str:
        """The paper's choice, or the first option if the paper has none."""
        return self.expected[0][1] if self.expected else next(iter(self.options))


LEAP_ALIGN = ("leap_align", {})
ABLATIONS = {
    "alpha": Ablation(
        {f"{alpha:g}": ("leap_align", {"alpha": alpha}) for alpha in ALPHAS},
        (("reward", "0.3", "0"), ("reward", "0.3", "1")),
        "Fig. 4",
    ),
    "leaps": Ablation(
        {"1": ("one_leap", {}), "2": LEAP_ALIGN, "3": ("three_leaps", {})},
        (("reward", "2", "1"), ("reward", "2", "3")),
        "Fig. 5",
    ),
    "reward of": Ablation(
        {"x̂_0": ("reward_on_leap", {}), "x_0": LEAP_ALIGN},
        (("reward", "x_0", "x̂_0"),),
        "Fig. 6",
    ),
    "weight": Ablation(
        {"none": ("no_weight", {}), "d_j": ("weight_by_d_j", {}), "d_0": ("weight_by_d_0", {}), "both": LEAP_ALIGN},
        (("reward", "both", "none"), ("reward", "both", "d_j"), ("reward", "both", "d_0")),
        "Fig. 7",
    ),
    "timesteps": Ablation(
        {"[0, 1/2]": ("leap_align", {"high": 12}), "[0, 1]": LEAP_ALIGN},
        (("reward", "[0, 1]", "[0, 1/2]"),),
        "Fig. 8",
    ),
    "k - j": Ablation(
        {f"{d}": (f"distance_{d}", {}) for d in (1, 6, 12, 18)} | {"random": LEAP_ALIGN},
        tuple(("reward", "random", distance) for distance in ("1", "6", "12", "18")),
        "Fig. 9",
    ),
    "nested only, alpha": Ablation(
        {f"{alpha:g}": ("nested_only", {"alpha": alpha}) for alpha in (0.0, 0.3, 1.0)},
        (("reward", "0.3", "0"), ("reward", "0", "1"), ("grad_norm", "1", "0"), ("grad_norm", "1", "0.3")),
        "supplement's Fig. 2",
        ema_decay=0.0,
    ),
    "lambda": Ablation(
        {
            "-2": ("leap_align", {"lam": -2.0}),
            "-1": ("leap_align", {"lam": -1.0}),
            "0": LEAP_ALIGN,
            "1": ("leap_align", {"lam": 1.0}),
            "none": ("leap_align", {"lam": None}),
        },
        (("reward", "0", "-2"), ("utility", "0", "-2"), ("utility", "0", "none")),
        "supplement's Table 2",
    ),
}

Runs = dict[tuple[str, str, str], list[RunMetrics]]
"""(task, ablation, option) -> the metrics of its runs, a list over the seeds."""


def run(lab: Laboratory) -> None:
    """Runs every option of every ablation, and writes the tables and the figure."""
    scale, runs = lab.scale, training_runs(lab)
    rows = [
        {"task": task, "ablation": name, "option": option, "iterations": iteration}
        | summarize([run[iteration] for run in seed_runs])
        for (task, name, option), seed_runs in runs.items()
        for iteration in scale.ablation_iterations
    ]
    lab.publish("ablations", rows, tables(rows, scale), directions(runs, scale))
    references = {name: ablation.reference for name, ablation in ABLATIONS.items()}
    plots.ablations(lab.out / "ablations.png", rows, references)


def training_runs(lab: Laboratory) -> Runs:
    """Runs of every option at the learning rate that was chosen for LeapAlign's large budget."""
    scale, learning_rates = lab.scale, lab.learning_rates(("leap_align",), {"hinge": 0.0})
    settings = {}
    for task, (name, ablation) in product(scale.tasks, ABLATIONS.items()):
        for option, (method, changes) in ablation.options.items():
            settings[task, name, option] = {
                "task": task,
                "method": method,
                "lr": learning_rates[task, "hinge", "leap_align", "large"],
                "evaluate_at": list(scale.ablation_iterations),
                "hyper": {"lam": 0.0} | changes,
                "ema_decay": ablation.ema_decay,
            }
    return lab.run_metrics(settings, "ablations")


def tables(rows: list[dict], scale: Scale) -> str:
    """A table for each ablation and task."""
    blocks = []
    for name, ablation in ABLATIONS.items():
        expected = "; ".join(f"{metric} at {greater} above {lesser}" for metric, greater, lesser in ablation.expected)
        blocks.append(f"### {name}")
        if expected:
            blocks.append(f"Expected from the paper ({ablation.source}): {expected}.")
        for task in scale.tasks:
            table_rows = [row for row in rows if (row["task"], row["ablation"]) == (task, name)]
            blocks.append(f"{task}, n = {table_rows[0]['n']}:")
            blocks.append(markdown_table(table_rows, ["option", "iterations", *EVALUATORS[task], "grad_norm"]))
    return "\n\n".join(blocks)


def directions(runs: Runs, scale: Scale) -> list[Direction]:
    """What the paper found in each ablation, after both numbers of iterations."""
    result = []
    for name, ablation in ABLATIONS.items():
        for (metric, *options), task in product(ablation.expected, scale.tasks):
            for iteration in scale.ablation_iterations:
                values = [[run[iteration][metric] for run in runs[task, name, option]] for option in options]
                claim, when = f"{name}: {' > '.join(options)}", f"{iteration} iterations"
                result.append(Direction(claim, ablation.source, task, metric, when, *values))
    return result
