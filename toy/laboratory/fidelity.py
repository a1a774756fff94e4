"""fidelity: how close each method's gradient is to the true one, over T and over training; weights of the timesteps."""

from leap_align import METHODS
from toy.laboratory import plots
from toy.laboratory.gradients import gradient_comparisons
from toy.laboratory.laboratory import Laboratory
from toy.laboratory.method_measurements import effective_weights
from toy.laboratory.tables import tables
from toy.laboratory.train_run import T

COLUMNS = ["method", "cosine", "ratio", "one_cosine", "variance", "draws", "every"]


def run(lab: Laboratory) -> None:
    """Compares gradients for every T and every stage of training, and publishes."""
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
    text = tables(rows, ("task", "T", "iterations"), "### {task}, T = {T}, after {iterations} iterations", COLUMNS)
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
