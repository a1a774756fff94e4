"""What the experiments share: how much they compute, training runs, learning rates, publishing of tables."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from leap_align import BadInput
from runtime.run_dir import write_csv, write_text
from toy.laboratory.method_measurements import evaluation_count
from toy.laboratory.result_cache import Function, ResultCache
from toy.laboratory.tables import Direction, tally, verdicts
from toy.laboratory.train_run import fresh_task, seconds_per_iteration, train_run
from toy.summary import mean_and_error

T = 25
"""Steps of a sampling run."""
HINGES = {"hinge": 0.0, "no hinge": None}
"""lambda of each: the mean reward of real data, or no hinge; the same for all methods."""
EVALUATORS = {
    "toy": ("reward", "utility", "alignment", "log_density", "spread"),
    "digits": ("reward", "utility", "svm", "forest", "nearest_real", "diversity"),
}
"""Evaluators of each task: the reward that is trained on, then the held-out ones, with diversity last."""

Settings = dict[str, Any]
Metrics = dict[str, float]
RunMetrics = dict[int, Metrics]
"""Iteration -> the metrics of a training run there."""
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Scale:
    """How much the experiments compute."""

    tasks: tuple[str, ...] = ("toy", "digits")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the runs in the tables."""
    tuning_seeds: tuple[int, ...] = (100, 101)
    """Seeds of the runs that choose learning rates."""
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    budgets: dict[str, int] = field(default_factory=lambda: {"small": 60, "large": 300})
    """Iterations of LeapAlign: before anything saturates, and after."""
    ablation_iterations: tuple[int, int] = (60, 150)
    """Iterations after which the ablations are evaluated."""
    step_counts: tuple[int, ...] = (5, 10, 25, 50, 100)
    """Values of T at which gradients are compared."""
    training_step_counts: tuple[int, ...] = (5, 6, 8, 12, 25)
    """Values of T at which `beyond` trains."""
    training_stages: tuple[int, ...] = (0, 30, 100, 300)
    """Iterations of training after which gradients are compared."""
    max_draws: int = 300
    """Draws of a method over which its mean gradient is taken."""
    batch_size: int = 256
    """Samples of a gradient."""
    smoke: bool = False


SMOKE = Scale(
    tasks=("toy",),
    seeds=(0, 1),
    tuning_seeds=(100,),
    learning_rates=(1e-4, 1e-3),
    budgets={"small": 1, "large": 8},
    ablation_iterations=(1, 2),
    step_counts=(3, 5),
    training_step_counts=(25,),
    training_stages=(0, 2),
    max_draws=4,
    batch_size=8,
    smoke=True,
)


@dataclass(frozen=True)
class Laboratory:
    """The output folder, the cache that computes results, and how much to compute."""

    out: Path
    cache: ResultCache
    scale: Scale

    def train_runs(
        self, settings: dict[Key, Settings], seeds: tuple[int, ...], title: str, function: Function = train_run
    ) -> dict[Key, list[dict[str, Any]]]:
        """What train_run, or another function, returns for each key's settings, a list over the seeds."""
        for task in {s["task"] for s in settings.values()}:
            fresh_task(task, smoke=self.scale.smoke)  # pre-trains it here, because otherwise every worker would
        shared = {"batch_size": 64, "ema_decay": 0.99, "smoke": self.scale.smoke}
        keys = list(product(settings, seeds))
        runs = self.cache.results(function, [shared | settings[key] | {"seed": seed} for key, seed in keys], title)
        run_by_key = dict(zip(keys, runs))
        return {key: [run_by_key[key, seed] for seed in seeds] for key in settings}

    def run_metrics(self, settings: dict[Key, Settings], title: str) -> dict[Key, list[RunMetrics]]:
        """The metrics of each key's training runs, a list over the seeds.

        Raises BadInput for a run that broke, because a table needs all of its seeds.
        """
        runs = self.train_runs(settings, self.scale.seeds, title)
        for key, s in settings.items():
            for seed, run in zip(self.scale.seeds, runs[key]):
                if run["error"]:
                    error = " ".join(run["error"].split())
                    raise BadInput(f"{s['task']}, {s['method']}, lr {s['lr']}, seed {seed} broke: {error:.200}")
        return {
            key: [{int(iteration): metrics for iteration, metrics in run["metrics"].items()} for run in key_runs]
            for key, key_runs in runs.items()
        }

    def learning_rates(self, methods: tuple[str, ...], hinges: dict[str, float | None]) -> dict[tuple, float]:
        """(task, hinge, method, budget) -> the learning rate with the highest mean reward at the end of the budget.

        The runs use the tuning seeds, which no table uses.
        """
        scale, settings = self.scale, {}
        for task, hinge, method, lr in product(scale.tasks, hinges, methods, scale.learning_rates):
            settings[task, hinge, method, lr] = {
                "task": task,
                "method": method,
                "lr": lr,
                "evaluate_at": sorted(scale.budgets.values()),
                "hyper": {"lam": hinges[hinge]},
            }
        runs = self.train_runs(settings, scale.tuning_seeds, "learning rates")
        best = {}
        for key in product(scale.tasks, hinges, methods):
            for budget, iteration in scale.budgets.items():
                rewards = {lr: mean_reward(runs[*key, lr], iteration) for lr in scale.learning_rates}
                best[*key, budget] = max(rewards, key=rewards.get)
        return best

    def evaluation_counts(self, settings: list[Settings]) -> list[float]:
        """Velocity evaluations an iteration and sample, for methods and their changed hyperparameters."""
        shared = {"T": T, "max_draws": self.scale.max_draws}
        results = self.cache.results(evaluation_count, [shared | s for s in settings], "evaluation counts")
        return [result["evaluations"] for result in results]

    def seconds_per_iteration(self, keys: list[tuple[str, str]], iterations: int) -> dict[tuple[str, str], float]:
        """(task, method) -> seconds of an iteration, always measured one run at a time."""
        settings = [
            {"task": task, "method": method, "iterations": iterations, "smoke": self.scale.smoke}
            for task, method in keys
        ]
        results = ResultCache(self.cache.folder, workers=1).results(seconds_per_iteration, settings, "seconds")
        return {key: result["seconds"] for key, result in zip(keys, results)}

    def publish(self, name: str, rows: list[dict], text: str, directions: list[Direction] | None = None) -> None:
        """Writes the rows to NAME.csv, the paper's directions to NAME-directions.csv, and the tables to NAME.md.

        The tables, given as Markdown text, also go to the screen.
        """
        write_csv(self.out / f"{name}.csv", rows)
        if directions:
            direction_rows = [direction.row() for direction in directions]
            write_csv(self.out / f"{name}-directions.csv", direction_rows)
            title = f"### The paper's directions (n = {direction_rows[0]['n']}; {tally(direction_rows)})"
            text += f"\n\n{title}\n\n{verdicts(direction_rows)}"
        write_text(self.out / f"{name}.md", text + "\n")
        print(text)
        print(f"\n{self.out / name}.csv, .md and .png")


def mean_reward(runs: list[dict[str, Any]], iteration: int) -> float:
    """The mean reward of tuning runs after some iteration; a run that broke counts as worse than any other."""
    rewards = [-1e9 if run["error"] else run["metrics"][str(iteration)]["reward"] for run in runs]
    mean, _ = mean_and_error(rewards)
    return mean
