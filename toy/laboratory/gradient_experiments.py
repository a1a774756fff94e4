"""The experiments on gradients: fidelity, pairs and memory."""

from itertools import product

from leap_align import METHODS
from runtime.cost_counter import saved_bytes
from toy.laboratory import plots
from toy.laboratory.gradients import INPUT_SEED, GradientSampler, Moments, gradient_comparisons
from toy.laboratory.laboratory import Laboratory
from toy.laboratory.method_measurements import effective_weights
from toy.laboratory.tables import summarize, tables
from toy.laboratory.train_run import T

PAIRS = {"batch": "leap_align", "sample": "leap_align_per_sample"}  # what has a pair of timesteps, and the method
REDRAWN = ("timesteps", "everything")  # between two gradients: only the timesteps, or also noise and prompts


def fidelity(lab: Laboratory) -> None:
    """How close each method's gradient is to the true one, over T and over training; weights of the timesteps."""
    scale = lab.scale
    steps = T if T in scale.step_counts else scale.step_counts[-1]
    cases = [(task, step_count, 0) for task in scale.tasks for step_count in scale.step_counts]
    cases += [(task, steps, stage) for task in scale.tasks for stage in scale.training_stages[1:]]
    comparisons = gradient_comparisons(lab, cases)
    rows = [
        dict(zip(("task", "T", "iterations"), case)) | {"true_norm": comparisons[case]["norm"], "method": name} | values
        for case in cases
        for name, values in comparisons[case]["methods"].items()
    ]
    settings = {method: {"method": method, "T": steps, "max_draws": scale.max_draws} for method in METHODS}
    results = lab.cache.results(effective_weights, settings, "weights")
    weights = {method: result["weights"] for method, result in results.items()}
    for task in scale.tasks:
        weights[f"leap_align x w_sim, {task}"] = weights_by_similarity(comparisons[task, steps, 0]["pairs"], steps)
    weight_rows = [{"i": i + 1, **{name: values[i] for name, values in weights.items()}} for i in range(steps)]
    columns = ["method", "cosine", "ratio", "one_cosine", "variance", "draws", "every"]
    text = tables(rows, ("task", "T", "iterations"), "### {task}, T = {T}, after {iterations} iterations", columns)
    lab.publish("fidelity", rows, text, plots.fidelity(rows, weight_rows, steps), weights=weight_rows)


def weights_by_similarity(pairs: list[tuple[int, int, float]], steps: int) -> list[float]:
    """LeapAlign's weight of every timestep if each pair (i_k, i_j) counts by its mean w_sim.

    A pair gives timestep k the weight k - j and timestep j the weight j.
    """
    weights, total = [0.0] * (steps + 1), sum(w_sim for _, _, w_sim in pairs)
    for i_k, i_j, w_sim in pairs:
        weights[i_k] += w_sim / total * (i_k - i_j) / steps
        weights[i_j] += w_sim / total * i_j / steps
    return weights[1:]


def pairs(lab: Laboratory) -> None:
    """One pair of timesteps a batch, as in the paper, against one pair a sample, at equal compute."""
    evaluations, rates = lab.evaluation_counts(PAIRS), lab.learning_rates(("leap_align",), {"hinge": 0.0})
    ends, settings, rows = {}, {}, []
    for kind, (budget, n) in product(PAIRS, lab.scale.budgets.items()):
        ends.setdefault(kind, {})[budget] = round(n * evaluations["batch"] / evaluations[kind])
    for task, (kind, method) in product(lab.scale.tasks, PAIRS.items()):
        run = {"task": task, "method": method, "lr": rates[task, "hinge", "leap_align", "large"], "hyper": {}}
        settings[task, kind] = run | {"evaluate_at": list(ends[kind].values())}
    runs = lab.run_metrics(settings, "pairs")
    tasks = {task: {"task": task, "draws": lab.scale.max_draws} for task in lab.scale.tasks}
    variances = lab.results(gradient_variance, tasks, "variances")
    for (task, kind), budget in product(runs, lab.scale.budgets):
        n = ends[kind][budget]
        row = {"task": task, "pairs": kind, "budget": budget, "iterations": n}
        row |= {"evaluations": round(n * evaluations[kind])}
        row |= {f"variance, {redrawn}": variances[task][f"{kind} {redrawn}"]["variance"] for redrawn in REDRAWN}
        rows.append(row | summarize([run[n] for run in runs[task, kind]], task, "grad_norm"))
    columns = ["pairs", "budget", "iterations", "evaluations", *(f"variance, {redrawn}" for redrawn in REDRAWN)]
    title = "### {task}, equal compute (n = {n}, mean ± standard error)"
    lab.publish("pairs", rows, tables(rows, ("task",), title, [*columns, "evaluators"]), plots.pairs(rows, REDRAWN))


def gradient_variance(task: str, draws: int, batch_size: int = 64, smoke: bool = False) -> dict:
    """The variance of both methods' gradients before training: {"KIND REDRAWN": Moments.values()}."""
    sampler, moments_by_name = GradientSampler(task, T, batch_size, smoke), {}
    true = sampler.gradient("full_backprop", 0)
    for (kind, method), redrawn in product(PAIRS.items(), REDRAWN):
        moments = Moments(true)
        for seed in range(draws):
            sampler.sample_inputs(batch_size, INPUT_SEED if redrawn == "timesteps" else seed)
            moments.add(sampler.gradient(method, seed))
        moments_by_name[f"{kind} {redrawn}"] = moments.values()
    return moments_by_name


def memory(lab: Laboratory) -> None:
    """Bytes saved for backward, and the gradient's norm, for LeapAlign and full backpropagation as T grows."""
    cases, rows = list(product(lab.scale.tasks, lab.scale.step_counts)), []
    comparisons = gradient_comparisons(lab, [(*case, 0) for case in cases])
    settings = {case: {"task": case[0], "T": case[1], "batch_size": lab.scale.batch_size} for case in cases}
    bytes_saved = lab.results(saved_for_backward, settings, "memory")
    for task, steps in cases:
        found = comparisons[task, steps, 0]
        row = {"task": task, "T": steps} | bytes_saved[task, steps] | {"norm, full_backprop": found["norm"]}
        names = ("leap_align 0", "leap_align 0.3", "leap_align 1")
        rows.append(row | {f"norm, {name}": found["methods"][name]["one_norm"] for name in names})
    text = tables(rows, ("task",), "### {task}", [name for name in rows[0] if name != "task"])
    lab.publish("memory", rows, text, plots.memory(rows))


def saved_for_backward(task: str, T: int, batch_size: int, smoke: bool = False) -> dict:
    """Bytes that a step saves for backward, without the weights, by LeapAlign and by full backpropagation."""
    sampler = GradientSampler(task, T, batch_size, smoke)
    return {
        f"bytes, {method}": saved_bytes(lambda method=method: sampler.gradient(method, 0), sampler.task.model)
        for method in ("leap_align", "full_backprop")
    }
