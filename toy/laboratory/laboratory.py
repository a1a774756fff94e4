"""What the experiments share: how much they compute, training runs, learning rates, publishing of tables."""

from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from leap_align import require
from runtime.files import atomic_file, write_csv, write_text
from toy.laboratory.method_measurements import evaluation_count
from toy.laboratory.result_cache import Function, Key, ResultCache, Settings
from toy.laboratory.tables import Row, directions_table
from toy.laboratory.train_run import T, fresh_task, seconds_per_iteration, train_run
from toy.summary import mean_and_error

HINGES = {"hinge": 0.0, "no hinge": None}  # lambda: the mean reward of real data, or no hinge; for all methods

Run = dict[str, Any]  # what train_run returns
RunMetrics = dict[int, dict[str, float]]  # iteration -> the metrics of a training run there


@dataclass(frozen=True)
class Scale:
    """How much the experiments compute."""

    tasks: tuple[str, ...] = ("toy", "digits")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of the runs in the tables
    tuning_seeds: tuple[int, ...] = (100, 101)  # of the runs that choose learning rates
    more_tuning_seeds: tuple[int, ...] = (100, 101, 102, 103)  # the same for `beyond`'s short runs, which vary more
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    # Iterations of LeapAlign: before anything saturates, and after.
    budgets: dict[str, int] = field(default_factory=lambda: {"small": 60, "large": 300})
    ablation_iterations: tuple[int, int] = (20, 60)  # after which the ablations are evaluated
    step_counts: tuple[int, ...] = (5, 10, 25, 50, 100)  # values of T at which gradients are compared
    samplers: tuple[tuple[int, str], ...] = ((25, "euler"), (8, "euler"), (8, "ab2"))  # T and solver in `beyond`
    beyond_iterations: int = 30  # of the published LeapAlign, whose evaluations are the budget of `beyond`
    training_stages: tuple[int, ...] = (0, 30, 100, 300)  # iterations after which gradients are compared
    shapes_iterations: int = 50  # of `shapes`
    shapes_seeds: tuple[int, ...] = (0, 1, 2)
    shapes_learning_rates: tuple[float, ...] = (1e-4, 3e-4)
    max_draws: int = 300  # of a method, over which its mean gradient is taken
    batch_size: int = 256  # samples of a gradient
    smoke: bool = False


SMOKE = Scale(
    tasks=("toy",), seeds=(0, 1), tuning_seeds=(100,), more_tuning_seeds=(100,), learning_rates=(1e-3,),
    budgets={"small": 1, "large": 4}, ablation_iterations=(1, 2), step_counts=(3, 5), samplers=((25, "euler"),),
    beyond_iterations=2, training_stages=(0, 2), shapes_iterations=1, shapes_seeds=(0, 1),
    shapes_learning_rates=(1e-4,), max_draws=4, batch_size=8, smoke=True,
)  # fmt: skip


@dataclass(frozen=True)
class Laboratory:
    """The output folder, the cache that computes results, and how much to compute."""

    out: Path
    cache: ResultCache
    scale: Scale

    def results(self, function: Function, settings: dict[Key, Settings], title: str) -> dict[Key, dict]:
        """function(**s) for each key's settings of a task."""
        for task in {s["task"] for s in settings.values()}:
            fresh_task(task, smoke=self.scale.smoke)  # pre-trains it here, because otherwise every worker would
        return self.cache.results(function, {k: s | {"smoke": self.scale.smoke} for k, s in settings.items()}, title)

    def train_runs(self, settings: dict[Key, Settings], title: str, seeds: tuple[int, ...]) -> dict[Key, list[Run]]:
        """What train_run returns for each key's settings, a list over the seeds."""
        seeded = {(key, seed): settings[key] | {"seed": seed} for key, seed in product(settings, seeds)}
        runs = self.results(train_run, seeded, title)
        return {key: [runs[key, seed] for seed in seeds] for key in settings}

    def run_metrics(
        self, settings: dict[Key, Settings], title: str, seeds: tuple[int, ...] = ()
    ) -> dict[Key, list[RunMetrics]]:
        """The metrics of each key's training runs, a list over the seeds of the tables; a run that broke is refused."""
        seeds = seeds or self.scale.seeds
        runs = self.train_runs(settings, title, seeds)
        for (key, s), (n, seed) in product(settings.items(), enumerate(seeds)):
            error = " ".join(runs[key][n]["error"].split())
            require(not error, f"{s['task']}, {s['method']}, lr {s['lr']}, seed {seed} broke: {error:.200}")
        return {k: [dict(zip(s["evaluate_at"], run["metrics"])) for run in runs[k]] for k, s in settings.items()}

    def learning_rates(self, methods: tuple[str, ...], hinges: dict[str, float | None]) -> dict[tuple, float]:
        """(task, hinge, method, budget) -> the learning rate with the highest mean reward at the end of the budget."""
        rates, ends, settings, best = self.scale.learning_rates, list(self.scale.budgets.values()), {}, {}
        for task, hinge, method, lr in product(self.scale.tasks, hinges, methods, rates):
            run = {"task": task, "method": method, "lr": lr, "evaluate_at": ends, "hyper": {"lam": hinges[hinge]}}
            settings[task, hinge, method, lr] = run
        runs = self.train_runs(settings, "learning rates", self.scale.tuning_seeds)
        for key, (n, budget) in product(product(self.scale.tasks, hinges, methods), enumerate(self.scale.budgets)):
            best[*key, budget] = max(rates, key=lambda lr: tuning_score(runs[*key, lr], "reward", n))
        return best

    def evaluation_counts(self, methods: dict[Key, str]) -> dict[Key, float]:
        """Velocity evaluations an iteration and sample, of the methods."""
        settings = {k: {"method": method, "T": T, "max_draws": self.scale.max_draws} for k, method in methods.items()}
        results = self.cache.results(evaluation_count, settings, "evaluation counts")
        return {key: result["evaluations"] for key, result in results.items()}

    def seconds_per_iteration(self, keys: list[tuple[str, str]], iterations: int) -> dict[tuple[str, str], float]:
        """(task, method) -> seconds of an iteration, always measured one run at a time."""
        alone = replace(self, cache=replace(self.cache, workers=1))
        settings = {key: {"task": key[0], "method": key[1], "iterations": iterations} for key in keys}
        results = alone.results(seconds_per_iteration, settings, "seconds")
        return {key: result["seconds"] for key, result in results.items()}

    def publish(self, name: str, rows: list[Row], text: str, figure: Figure | None = None, **others: list[Row]) -> None:
        """Writes NAME.png, NAME.csv, NAME-OTHER.csv of each other table, and the text in Markdown to NAME.md.

        The text also goes to the screen.  `directions` (tables.direction) are added to it.
        """
        write_csv(self.out / f"{name}.csv", rows)
        for other, table in others.items():
            write_csv(self.out / f"{name}-{other}.csv", table)
        if "directions" in others:
            text += f"\n\n{directions_table(others['directions'])}"
        write_text(self.out / f"{name}.md", text + "\n")
        if figure is not None:
            with atomic_file(self.out / f"{name}.png") as temporary:
                figure.savefig(temporary, dpi=110, format="png")
        print(f"{text}\n\n{self.out / name}.*")


def tuning_score(runs: list[Run], metric: str, n: int = -1) -> float:
    """The mean metric of tuning runs at their n-th evaluation; a run that broke counts as worse than any other."""
    return mean_and_error([-1e9 if run["error"] else run["metrics"][n][metric] for run in runs])[0]
