"""pairs: LeapAlign with one pair of timesteps a batch, as in the paper, against one pair a sample, at equal compute."""

from toy.laboratory import plots
from toy.laboratory.gradients import INPUT_SEED, GradientSampler, Moments
from toy.laboratory.laboratory import EVALUATORS, Laboratory, RunMetrics, T
from toy.laboratory.tables import summarize
from toy.summary import markdown_table

KINDS = ("batch", "sample")
"""Values of the hyperparameter `pairs`."""
REDRAWN = ("timesteps", "everything")
"""What is drawn again between two gradients: only the timesteps, or also noise and prompts."""


def run(lab: Laboratory) -> None:
    """Trains with both kinds of pairs, measures the variance of their gradients, writes the table and the figure."""
    evaluations = dict(zip(KINDS, lab.evaluation_counts([{"method": "leap_align", "pairs": kind} for kind in KINDS])))
    iterations = {
        kind: {budget: round(n * evaluations["batch"] / evaluations[kind]) for budget, n in lab.scale.budgets.items()}
        for kind in KINDS
    }
    runs, variances = training_runs(lab, iterations), measure_variances(lab)
    rows = []
    for (task, kind), seed_runs in runs.items():
        columns = {f"variance, {redrawn}": variances[task][f"{kind} {redrawn}"]["variance"] for redrawn in REDRAWN}
        for budget, n in iterations[kind].items():
            cost = {"budget": budget, "iterations": n, "evaluations": round(n * evaluations[kind])}
            metrics = summarize([run[n] for run in seed_runs])
            rows.append({"task": task, "pairs": kind} | cost | columns | metrics)
    lab.publish("pairs", rows, "\n\n".join(table(task, rows) for task in lab.scale.tasks))
    plots.pairs(lab.out / "pairs.png", rows, REDRAWN)


def training_runs(lab: Laboratory, iterations: dict[str, dict[str, int]]) -> dict[tuple[str, str], list[RunMetrics]]:
    """(task, pairs) -> the metrics of its runs, at the learning rate chosen for LeapAlign's large budget."""
    learning_rates = lab.learning_rates(("leap_align",), {"hinge": 0.0})
    settings = {
        (task, kind): {
            "task": task,
            "method": "leap_align",
            "lr": learning_rates[task, "hinge", "leap_align", "large"],
            "evaluate_at": list(iterations[kind].values()),
            "hyper": {"lam": 0.0, "pairs": kind},
        }
        for task in lab.scale.tasks
        for kind in KINDS
    }
    return lab.run_metrics(settings, "pairs")


def measure_variances(lab: Laboratory) -> dict[str, dict]:
    """Task -> what gradient_variance returns."""
    scale = lab.scale
    settings = [
        {"task": task, "draws": scale.max_draws, "batch_size": 64, "smoke": scale.smoke} for task in scale.tasks
    ]
    return dict(zip(scale.tasks, lab.cache.results(gradient_variance, settings, "variances")))


def gradient_variance(task: str, draws: int, batch_size: int, smoke: bool = False) -> dict:
    """The variance of LeapAlign's gradient before training: {"KIND REDRAWN": Moments.values()}."""
    sampler, moments_by_name = GradientSampler(task, T, 0, 0.0, batch_size, smoke), {}
    true = sampler.gradient("full_backprop", 0)
    for kind in KINDS:
        for redrawn in REDRAWN:
            moments = Moments(true)
            for seed in range(draws):
                sampler.sample_inputs(batch_size, INPUT_SEED if redrawn == "timesteps" else seed)
                moments.add(sampler.gradient("leap_align", seed, pairs=kind))
            moments_by_name[f"{kind} {redrawn}"] = moments.values()
    return moments_by_name


def table(task: str, rows: list[dict]) -> str:
    """The table of one task, with its title."""
    table_rows = [row for row in rows if row["task"] == task]
    variances = [f"variance, {redrawn}" for redrawn in REDRAWN]
    columns = ["pairs", "budget", "iterations", "evaluations", *variances, *EVALUATORS[task]]
    n = f"n = {table_rows[0]['n']}, mean ± standard error"
    return f"### {task}, equal compute ({n})\n\n{markdown_table(table_rows, columns)}"
