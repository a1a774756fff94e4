"""shapes: the methods on the small FLUX.1 that draws, judged by kinds of prompts, with a hinge or on a leash."""

from dataclasses import dataclass, replace
from itertools import product

from toy.laboratory import plots
from toy.laboratory.laboratory import Laboratory, RunMetrics, tuning_score
from toy.laboratory.method_measurements import evaluation_count
from toy.laboratory.result_cache import Settings
from toy.laboratory.tables import EVALUATORS, Row, summarize, tables

COMMON = {"solver": "ab2", "batch_size": 32}
RESTRAINTS = {"leash": COMMON | {"lam": None, "beta": 0.1}, "hinge": COMMON | {"lam": 0.9}}
"""Rendered right images have a mean reward of 0.77, by kind 0.46 (two objects) to 0.93 (colors)."""
STEPS = 8  # of a sampling run in training, but for one row


@dataclass(frozen=True)
class Setting:
    """What a row of the tables trains with."""

    restraint: str
    method: str
    option: str = ""  # a changed hyperparameter, `alpha 1`, `low 4` or `high 4`
    T: int = STEPS

    def run(self, lr: float, evaluate_at: list[int]) -> Settings:
        """The arguments of train_run apart from the seed."""
        name, _, value = self.option.partition(" ")
        hyper = RESTRAINTS[self.restraint] | ({name: (float if name == "alpha" else int)(value)} if name else {})
        own = {"task": "shapes", "method": self.method, "hyper": hyper, "T": self.T}
        return own | {"lr": lr, "evaluate_at": evaluate_at}

    def tuned(self) -> "Setting":
        """The setting that this one's learning rate was tuned on: on the leash; for low, high and T = 25 LeapAlign."""
        is_own = self.T == STEPS and self.option.partition(" ")[0] in ("", "alpha")
        return replace(self, restraint="leash") if is_own else replace(self, option="alpha 0.3", T=STEPS)


def settings() -> list[Setting]:
    """All rows: the paper's methods; on the leash also others, LeapAlign on late or early timesteps alone, T = 25."""
    rows = [("refl",), ("draft_lv",), ("drtune",), ("leap_align", "alpha 0.3")]
    more = [("bridge",), ("stratified",), ("leap_align", "alpha 0"), ("leap_align", "alpha 1")]
    more += [("leap_align", f"{name} {STEPS // 2}") for name in ("high", "low")] + [("leap_align", "alpha 0.3", 25)]
    return [Setting("leash", *row) for row in rows + more] + [Setting("hinge", *row) for row in rows]


def run(lab: Laboratory) -> None:
    """Trains every setting to equal iterations and to equal evaluations, with the rate that other seeds chose."""
    rows, n = settings()[:: 9 if lab.scale.smoke else 1], lab.scale.shapes_iterations
    costs = evaluations(lab, rows)
    equal = {s: round(n * costs["leap_align", STEPS] / costs[s.method, s.T]) for s in rows}
    ends = {s: {"iterations": n, "evaluations": equal[s]} for s in rows}
    rates = learning_rates(lab, ends)
    planned = {s: s.run(rates[s], sorted(set(ends[s].values()))) for s in rows}
    pretrained = lab.run_metrics({None: rows[0].run(1e-4, [0])}, "pretrained", lab.scale.shapes_seeds[:1])[None][0][0]
    runs = lab.run_metrics(planned, "shapes", lab.scale.shapes_seeds)
    found = table_rows(runs, pretrained, rates, ends)
    columns = ["method", "option", "T", "lr", "iterations", "evaluators"]
    title = "### {restraint}, equal {equal} (n = {n}, mean ± standard error)"
    figure = plots.shapes(found, EVALUATORS["shapes"][1:-1])
    lab.publish("shapes", found, tables(found, ("restraint", "equal"), title, columns), figure)


def evaluations(lab: Laboratory, rows: list[Setting]) -> dict[tuple[str, int], float]:
    """(method, T) -> velocity evaluations an iteration and sample."""
    keys = {("leap_align", STEPS), *((s.method, s.T) for s in rows)}
    planned = {key: {"method": key[0], "T": key[1], "max_draws": lab.scale.max_draws} for key in sorted(keys)}
    results = lab.cache.results(evaluation_count, planned, "evaluations")
    return {key: result["evaluations"] for key, result in results.items()}


def learning_rates(lab: Laboratory, ends: dict[Setting, dict[str, int]]) -> dict[Setting, float]:
    """The rate of each setting with the highest judged share on a tuning seed, after equal iterations."""
    rates, seeds = lab.scale.shapes_learning_rates, lab.scale.tuning_seeds[:1]
    tuned = {s.tuned(): ends[s]["iterations"] for s in ends}
    tried = {(s, lr): s.run(lr, [tuned[s]]) for s, lr in product(tuned, rates)}
    runs = lab.train_runs(tried, "learning rates", seeds)
    return {s: max(rates, key=lambda lr: tuning_score(runs[s.tuned(), lr], "judged")) for s in ends}


def table_rows(
    runs: dict[Setting, list[RunMetrics]], pretrained: dict[str, float], rates: dict[Setting, float], ends: dict
) -> list[Row]:
    """A row for each setting and end; the first of each table is the model before training."""
    rows = []
    for restraint, equal in product(RESTRAINTS, ("iterations", "evaluations")):
        table = {"task": "shapes", "restraint": restraint, "equal": equal}
        rows.append(table | {"method": "pretrained"} | {name: pretrained[name] for name in EVALUATORS["shapes"]})
        for s in (s for s in runs if s.restraint == restraint):
            row = table | vars(s) | {"lr": rates[s], "iterations": ends[s][equal]}
            rows.append(row | summarize([run[ends[s][equal]] for run in runs[s]], "shapes"))
    return rows
