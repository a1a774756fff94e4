"""memory: bytes saved for backward, and the gradient's norm, for LeapAlign and full backpropagation as T grows."""

from runtime.counters import saved_bytes
from toy.laboratory import plots
from toy.laboratory.gradients import GradientSampler, gradient_comparisons
from toy.laboratory.laboratory import Laboratory
from toy.summary import markdown_table


def run(lab: Laboratory) -> None:
    """Counts bytes and measures norms for every T, and writes the tables and the figure."""
    scale = lab.scale
    cases = [(task, steps, 0) for task in scale.tasks for steps in scale.step_counts]
    settings = [
        {"task": task, "T": steps, "batch_size": scale.batch_size, "smoke": scale.smoke} for task, steps, _ in cases
    ]
    comparisons = gradient_comparisons(lab, cases)
    byte_counts = dict(zip(cases, lab.cache.results(saved_for_backward, settings, "memory")))
    rows = [{"task": case[0], "T": case[1]} | byte_counts[case] | gradient_norms(comparisons[case]) for case in cases]
    lab.publish("memory", rows, "\n\n".join(table(task, rows) for task in scale.tasks))
    plots.memory(lab.out / "memory.png", rows)


def saved_for_backward(task: str, T: int, batch_size: int, smoke: bool = False) -> dict:
    """Bytes that a step saves for backward, without the weights, by LeapAlign and by full backpropagation."""
    sampler = GradientSampler(task, T, 0, 0.0, batch_size, smoke)
    return {
        f"bytes, {method}": saved_bytes(lambda method=method: sampler.gradient(method, 0), sampler.task.model)
        for method in ("leap_align", "full_backprop")
    }


def gradient_norms(comparison: dict) -> dict[str, float]:
    """The norm of full backpropagation's gradient, and the norm of one draw of LeapAlign's for some alpha."""
    norms = {"norm, full_backprop": comparison["norm"]}
    for name in ("leap_align 0", "leap_align 0.3", "leap_align 1"):
        norms[f"norm, {name}"] = comparison["methods"][name]["one_norm"]
    return norms


def table(task: str, rows: list[dict]) -> str:
    """The table of one task, with its title."""
    table_rows = [row for row in rows if row["task"] == task]
    columns = [name for name in table_rows[0] if name != "task"]
    return f"### {task}\n\n{markdown_table(table_rows, columns)}"
