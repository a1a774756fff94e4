"""memory: bytes saved for backward, and the gradient's norm, for LeapAlign and full backpropagation as T grows."""

from itertools import product

from runtime.counters import saved_bytes
from toy.laboratory import plots
from toy.laboratory.gradients import GradientSampler, gradient_comparisons
from toy.laboratory.laboratory import Laboratory
from toy.laboratory.tables import tables


def run(lab: Laboratory) -> None:
    """Counts bytes and measures norms for every T, and publishes."""
    cases = list(product(lab.scale.tasks, lab.scale.step_counts))
    comparisons = gradient_comparisons(lab, [(*case, 0) for case in cases])
    settings = {case: {"task": case[0], "T": case[1], "batch_size": lab.scale.batch_size} for case in cases}
    bytes_saved, rows = lab.results(saved_for_backward, settings, "memory"), []
    for task, T in cases:
        row = {"task": task, "T": T} | bytes_saved[task, T] | {"norm, full_backprop": comparisons[task, T, 0]["norm"]}
        for name in ("leap_align 0", "leap_align 0.3", "leap_align 1"):
            row[f"norm, {name}"] = comparisons[task, T, 0]["methods"][name]["one_norm"]
        rows.append(row)
    text = tables(rows, ("task",), "### {task}", [name for name in rows[0] if name != "task"])
    lab.publish("memory", rows, text, plots.memory(rows))


def saved_for_backward(task: str, T: int, batch_size: int, smoke: bool = False) -> dict:
    """Bytes that a step saves for backward, without the weights, by LeapAlign and by full backpropagation."""
    sampler = GradientSampler(task, T, batch_size, smoke)
    return {
        f"bytes, {method}": saved_bytes(lambda method=method: sampler.gradient(method, 0), sampler.task.model)
        for method in ("leap_align", "full_backprop")
    }
