"""pairs: LeapAlign with one pair of timesteps a batch, as in the paper, against one pair a sample, at equal compute."""

from itertools import product

from toy.laboratory import plots
from toy.laboratory.gradients import INPUT_SEED, GradientSampler, Moments
from toy.laboratory.laboratory import Laboratory
from toy.laboratory.tables import summarize, tables
from toy.laboratory.train_run import T

KINDS = {"batch": "leap_align", "sample": "leap_align_per_sample"}
"""What has a pair, and the method."""
REDRAWN = ("timesteps", "everything")
"""What is drawn again between two gradients: only the timesteps, or also noise and prompts."""


def run(lab: Laboratory) -> None:
    """Trains both methods at the learning rate of LeapAlign's large budget, measures variances, and publishes."""
    evaluations, rates = lab.evaluation_counts(KINDS), lab.learning_rates(("leap_align",), {"hinge": 0.0})
    ends = {
        kind: {budget: round(n * evaluations["batch"] / evaluations[kind]) for budget, n in lab.scale.budgets.items()}
        for kind in KINDS
    }
    settings = {}
    for task, kind in product(lab.scale.tasks, KINDS):
        run = {"task": task, "method": KINDS[kind], "lr": rates[task, "hinge", "leap_align", "large"], "hyper": {}}
        settings[task, kind] = run | {"evaluate_at": list(ends[kind].values())}
    runs = lab.run_metrics(settings, "pairs")
    tasks = {task: {"task": task, "draws": lab.scale.max_draws} for task in lab.scale.tasks}
    variances, rows = lab.results(gradient_variance, tasks, "variances"), []
    columns = [f"variance, {redrawn}" for redrawn in REDRAWN]
    for (task, kind), budget in product(runs, lab.scale.budgets):
        n = ends[kind][budget]
        row = {
            "task": task,
            "pairs": kind,
            "budget": budget,
            "iterations": n,
            "evaluations": round(n * evaluations[kind]),
        }
        row |= {f"variance, {redrawn}": variances[task][f"{kind} {redrawn}"]["variance"] for redrawn in REDRAWN}
        rows.append(row | summarize([run[n] for run in runs[task, kind]], task, "grad_norm"))
    columns = ["pairs", "budget", "iterations", "evaluations", *columns, "evaluators"]
    text = tables(rows, ("task",), "### {task}, equal compute (n = {n}, mean ± standard error)", columns)
    lab.publish("pairs", rows, text, plots.pairs(rows, REDRAWN))


def gradient_variance(task: str, draws: int, batch_size: int = 64, smoke: bool = False) -> dict:
    """The variance of both methods' gradients before training: {"KIND REDRAWN": Moments.values()}."""
    sampler, moments_by_name = GradientSampler(task, T, batch_size, smoke), {}
    true = sampler.gradient("full_backprop", 0)
    for kind, redrawn in product(KINDS, REDRAWN):
        moments = Moments(true)
        for seed in range(draws):
            sampler.sample_inputs(batch_size, INPUT_SEED if redrawn == "timesteps" else seed)
            moments.add(sampler.gradient(KINDS[kind], seed))
        moments_by_name[f"{kind} {redrawn}"] = moments.values()
    return moments_by_name
