"""fidelity: how close each method's gradient is to the true one, over T and over training; weights of the timesteps."""

from leap_align import METHODS
from runtime.run_dir import write_csv
from toy.laboratory import plots
from toy.laboratory.gradients import Case, gradient_comparisons
from toy.laboratory.laboratory import Laboratory, T
from toy.laboratory.method_measurements import effective_weights
from toy.summary import markdown_table

COLUMNS = ["method", "cosine", "ratio", "one_cosine", "variance", "draws", "every"]


def run(lab: Laboratory) -> None:
    """Compares gradients for every T and every stage of training, and writes the tables and the figure."""
    scale = lab.scale
    steps = T if T in scale.step_counts else scale.step_counts[-1]
    cases = [(task, step_count, 0) for task in scale.tasks for step_count in scale.step_counts]
    cases += [(task, steps, stage) for task in scale.tasks for stage in scale.training_stages[1:]]
    comparisons = gradient_comparisons(lab, cases)
    rows = [row for case in cases for row in method_rows(case, comparisons[case])]
    weights = timestep_weights(lab, steps)
    for task in scale.tasks:
        weights[f"leap_align x w_sim, {task}"] = weights_by_similarity(comparisons[task, steps, 0]["pairs"], steps)
    weight_rows = [{"i": i + 1, **{name: values[i] for name, values in weights.items()}} for i in range(steps)]
    write_csv(lab.out / "fidelity-weights.csv", weight_rows)
    lab.publish("fidelity", rows, "\n\n".join(table(case, rows) for case in cases))
    plots.fidelity(lab.out / "fidelity.png", rows, weight_rows, steps)


def method_rows(case: Case, comparison: dict) -> list[dict]:
    """A row for each method in one case."""
    shared = dict(zip(("task", "T", "iterations"), case)) | {"true_norm": comparison["norm"]}
    return [shared | {"method": name} | values for name, values in comparison["methods"].items()]


def table(case: Case, rows: list[dict]) -> str:
    """The table of one case, with its title."""
    task, steps, iterations = case
    table_rows = [row for row in rows if (row["task"], row["T"], row["iterations"]) == case]
    return f"### {task}, T = {steps}, after {iterations} iterations\n\n{markdown_table(table_rows, COLUMNS)}"


def timestep_weights(lab: Laboratory, steps: int) -> dict[str, list[float]]:
    """The mean weight that each method gives to every timestep."""
    settings = [{"method": method, "T": steps, "max_draws": lab.scale.max_draws} for method in METHODS]
    results = lab.cache.results(effective_weights, settings, "weights")
    return {method: result["weights"] for method, result in zip(METHODS, results)}


def weights_by_similarity(pairs: list[tuple[int, int, float]], steps: int) -> list[float]:
    """LeapAlign's weight of every timestep if each pair (i_k, i_j) counts by its mean w_sim.

    A pair gives timestep k the weight k - j and timestep j the weight j.
    """
    weights, total = [0.0] * (steps + 1), sum(w_sim for _, _, w_sim in pairs)
    for i_k, i_j, w_sim in pairs:
        weights[i_k] += w_sim / total * (i_k - i_j) / steps
        weights[i_j] += w_sim / total * i_j / steps
    return weights[1:]
