"""What the experiments share: how much is computed, how learning rates are chosen, what is published."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leap_align import BadInput
from toy.cells import Cells
from toy.probe import evaluations
from toy.report import Direction, mean, tally, verdicts, write_csv
from toy.trial import fresh, pace, trained


@dataclass(frozen=True)
class Scale:
    """How much is computed."""

    tasks: tuple[str, ...] = ("toy", "digits")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seeds: tuple[int, ...] = (100, 101)
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    budgets: dict[str, int] = field(default_factory=lambda: {"small": 60, "large": 300})
    """Iterations of LeapAlign: before anything saturates, and after."""
    ablation_stops: tuple[int, int] = (60, 150)
    grids: tuple[int, ...] = (5, 10, 25, 50, 100)
    stages: tuple[int, ...] = (0, 30, 100, 300)
    """Iterations of training after which gradients are compared."""
    draws: int = 300
    batch: int = 256
    """Of these gradients."""
    smoke: bool = False


SMOKE = Scale(
    tasks=("toy",),
    seeds=(0, 1),
    tuning_seeds=(100,),
    rates=(1e-4, 1e-3),
    budgets={"small": 1, "large": 8},
    ablation_stops=(1, 2),
    grids=(3, 5),
    stages=(0, 2),
    draws=4,
    batch=8,
    smoke=True,
)


@dataclass(frozen=True)
class Laboratory:
    """Where the results go, what computes them, and how much of it."""

    out: Path
    cells: Cells
    scale: Scale

    def trials(self, settings: list[dict[str, Any]], title: str) -> list[dict]:
        """Training runs, with what they all have in common."""
        for name in {s["task"] for s in settings}:
            fresh(name, smoke=self.scale.smoke)  # pre-trained here, or every process would do it
        common = {"batch": 64, "ema": 0.99, "smoke": self.scale.smoke}
        return self.cells.results(trained, [common | s for s in settings], title)

    def rates(self, methods: tuple[str, ...], policies: dict[str, float | None]) -> dict[tuple, float]:
        """The learning rate with the highest reward at the end of each budget: (task, policy, method, budget) -> rate.

        From the grid, on seeds that no table uses.  A run that broke counts as the worst.
        """
        scale, stops = self.scale, sorted(self.scale.budgets.values())
        keys = [(task, policy, m) for task in scale.tasks for policy in policies for m in methods]
        settings = [
            {"task": task, "method": m, "lr": lr, "seed": seed, "stops": stops, "hyper": {"lam": policies[policy]}}
            for task, policy, m in keys
            for lr in scale.rates
            for seed in scale.tuning_seeds
        ]
        found = iter(self.trials(settings, "learning rates"))
        reached = {(*key, lr): [next(found) for _ in scale.tuning_seeds] for key in keys for lr in scale.rates}

        def reward(key: tuple, lr: float, stop: int) -> float:
            return mean([run["stops"][str(stop)]["reward"] if "stops" in run else -1e9 for run in reached[*key, lr]])[0]

        return {
            (*key, budget): max(scale.rates, key=lambda lr: reward(key, lr, stop))
            for key in keys
            for budget, stop in scale.budgets.items()
        }

    def runs(self, settings: list[dict[str, Any]], title: str) -> list[dict[str, dict]]:
        """Evaluations of training runs by their stops; refuses one that broke, for a table needs all of its seeds."""
        found = self.trials(settings, title)
        for s, run in zip(settings, found):
            if "failed" in run:
                reason = " ".join(run["failed"].split())
                raise BadInput(f"{s['task']}, {s['method']}, lr {s['lr']}, seed {s['seed']} broke: {reason:.200}")
        return [run["stops"] for run in found]

    def costs(self, T: int, settings: list[dict[str, Any]]) -> list[float]:
        """Evaluations of the velocity that an iteration costs a sample."""
        common = {"T": T, "most": self.scale.draws}
        return [r["evaluations"] for r in self.cells.results(evaluations, [common | s for s in settings], "costs")]

    def paces(self, keys: list[tuple[str, str]], iterations: int) -> dict[tuple, float]:
        """(task, method) -> seconds of an iteration, measured one after the other whatever the workers."""
        settings = [{"task": t, "method": m, "iterations": iterations, "smoke": self.scale.smoke} for t, m in keys]
        found = Cells(self.cells.folder, 1).results(pace, settings, "seconds")
        return {key: cell["seconds"] for key, cell in zip(keys, found)}

    def publish(self, name: str, rows: list[dict], text: str, directions: list[Direction] | None = None) -> None:
        """NAME.csv, NAME.md and, given what the paper expects, NAME-directions.csv; the text also on the screen."""
        write_csv(self.out / f"{name}.csv", rows)
        if directions:
            judged = [direction.row() for direction in directions]
            write_csv(self.out / f"{name}-directions.csv", judged)
            text += f"\n\n### The paper's directions (n = {judged[0]['n']}; {tally(judged)})\n\n{verdicts(judged)}"
        (self.out / f"{name}.md").write_text(text + "\n")
        print(text)
        print(f"\n{self.out / name}.csv, .md and .png")
