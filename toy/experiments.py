"""The laboratory: the paper's comparison and ablations where anyone can check them, and what only a toy can measure.

    python -m toy.experiments compare      every method, learning rates tuned, at equal samples and at equal compute
    python -m toy.experiments ablations    each part of LeapAlign exchanged or left out
    python -m toy.experiments fidelity     each method's gradient beside that of full backpropagation
    python -m toy.experiments pairs        one pair of timesteps a batch, as in the paper, or a pair a sample
    python -m toy.experiments memory       bytes kept for backward, and the gradient's length, as T grows
    python -m toy.experiments all          all of them

Each leaves NAME.csv, NAME.md and NAME.png in the output folder, and NAME-directions.csv where the paper says what to
expect.  What is computed is kept in its folder cells/: an experiment that was stopped goes on where it was, and one
that is finished draws its tables and figure anew.  After a change of the code delete the folder.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from leap_align import METHODS, BadInput
from toy import charts
from toy.cells import Cells
from toy.fidelity import ALPHAS, against_truth, saved, scatter
from toy.laboratory import SMOKE, Laboratory, Scale
from toy.probe import effective_weights
from toy.report import Direction, markdown, mean, write_csv
from toy.trial import fresh

POLICIES = {"hinge": 0.0, "no hinge": None}
"""lambda of each: at the mean reward of real data, or none; one for all methods."""
T = 25
FIGURES = {
    "toy": ("reward", "utility", "alignment", "log_density", "spread"),
    "digits": ("reward", "utility", "svm", "forest", "nearest_real", "diversity"),
}
"""Evaluators of each task: the one that is trained on, those held out, last the diversity."""


# ---------------------------------------------------------------------------------------------------------------------
# compare
# ---------------------------------------------------------------------------------------------------------------------


def compare(lab: Laboratory) -> None:
    """Every method at its best learning rate: equal samples and equal compute, small and large budgets, both hinges."""
    rates = lab.rates(tuple(METHODS), POLICIES)
    cost = dict(zip(METHODS, lab.costs(T, [{"name": method} for method in METHODS])))
    ends = {
        (budget, method): {"samples": n, "compute": round(n * cost["leap_align"] / cost[method])}
        for budget, n in lab.scale.budgets.items()
        for method in METHODS
    }
    runs = compared(lab, rates, ends)
    keys = [(task, method) for task in lab.scale.tasks for method in METHODS]
    seconds = lab.paces(keys, min(lab.scale.budgets.values()))
    rows, tables = [], []
    for (task, policy, method, budget), many in runs.items():
        lr = rates[task, policy, method, budget]
        for equal, end in ends[budget, method].items():
            about = {"task": task, "hinge": policy, "budget": budget, "equal": equal}
            if about not in tables:  # each begins with the model before training
                tables.append(about)
                before = [{name: run["0"][name] for name in FIGURES[task]} for run in many]
                rows.append(about | {"method": "pretrained"} | summary(before))
            spent = {
                "iterations": end,
                "evaluations": round(end * cost[method]),
                "seconds": end * seconds[task, method],
            }
            rows.append(about | {"method": method, "lr": lr} | spent | summary([run[str(end)] for run in many]))
    text = "\n\n".join(comparison(rows, *key) for key in dict.fromkeys(map(heading, rows)))
    lab.publish("compare", rows, text, [*compare_directions(runs, lab.scale)])
    charts.compare(lab.out / "compare.png", runs, FIGURES)


ALONG = (0.03, 0.07, 0.13, 0.2, 0.3, 0.43, 0.65)
"""Shares of a budget after which a run is evaluated for the figure."""


def compared(lab: Laboratory, rates: dict[tuple, float], ends: dict[tuple, dict]) -> dict[tuple, list[dict]]:
    """(task, policy, method, budget) -> the evaluations of every seed's run, by their stops."""
    settings = []
    for task, policy, method, budget in rates:
        along = [max(1, round(lab.scale.budgets[budget] * share)) for share in ALONG]
        settings += [
            {
                "task": task,
                "method": method,
                "lr": rates[task, policy, method, budget],
                "seed": seed,
                "stops": sorted({0, *along, *ends[budget, method].values()}),
                "hyper": {"lam": POLICIES[policy]},
            }
            for seed in lab.scale.seeds
        ]
    found = iter(lab.runs(settings, "compare"))
    return {key: [next(found) for _ in lab.scale.seeds] for key in rates}


def summary(figures: list[dict[str, float]]) -> dict[str, float]:
    """NAME and NAME_error of every figure over the seeds, and n."""
    columns = {"n": len(figures)}
    for name in figures[0]:
        columns[name], columns[f"{name}_error"] = mean([f[name] for f in figures])
    return columns


def heading(row: dict) -> tuple:
    return row["task"], row["hinge"], row["budget"], row["equal"]


def comparison(rows: list[dict], *key: str) -> str:
    """One table of the comparison, with its title."""
    task, policy, budget, equal = key
    some = [row for row in rows if heading(row) == key]
    columns = ["method", "lr", "iterations", *FIGURES[task], "grad_norm", "seconds"]
    n = f"n = {some[0]['n']}, mean ± standard error"
    return f"### {task}, {policy}, {budget} budget, equal {equal} ({n})\n\n{markdown(some, columns)}"


QUOTED = (
    ("leap_align", "drtune", "Table 2: 0.4092, 0.3882; SD3.5: 0.3915, 0.3828"),
    ("leap_align", "refl", "Table 2: 0.4092, 0.3852; SD3.5: 0.3915, 0.3833"),
    ("leap_align", "draft_lv", "Table 2: 0.4092, 0.3859; SD3.5: 0.3915, 0.3506"),
    ("drtune", "refl", "Table 2: 0.3882, 0.3852 (SD3.5 the other way: 0.3828, 0.3833)"),
    ("draft_lv", "refl", "Table 2: 0.3859, 0.3852 (SD3.5 the other way: 0.3506, 0.3833)"),
    ("drtune", "draft_lv", "Table 2: 0.3882, 0.3859; SD3.5: 0.3828, 0.3506"),
)
"""Which method the paper finds better than which, by HPSv2.1 on FLUX, at as many iterations."""


def compare_directions(runs: dict, scale: Scale):
    """The order of the methods in reward and in what people really want, under the hinge, at equal samples."""
    for task in scale.tasks:
        for budget, end in scale.budgets.items():
            for figure in ("reward", "utility"):
                values = {m: [run[str(end)][figure] for run in runs[task, "hinge", m, budget]] for m in METHODS}
                for better, worse, source in QUOTED:
                    claim, when = f"{better} > {worse}", f"{budget} budget"
                    yield Direction(claim, source, task, figure, when, values[better], values[worse])


# ---------------------------------------------------------------------------------------------------------------------
# ablations
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ablation:
    """One part of LeapAlign in several forms, of which the paper says which does better."""

    options: dict[str, tuple[str, dict[str, Any]]]
    """Name -> method or variant, and its changed hyperparameters."""
    expected: tuple[tuple[str, str, str], ...]
    """(figure, greater, lesser), as the paper found it."""
    source: str
    ema: float = 0.99


OWN = ("leap_align", {})
ABLATIONS = {
    "alpha": Ablation(
        {f"{alpha:g}": ("leap_align", {"alpha": alpha}) for alpha in ALPHAS},
        (("reward", "0.3", "0"), ("reward", "0.3", "1")),
        "Fig. 4",
    ),
    "leaps": Ablation(
        {"1": ("one_leap", {}), "2": OWN, "3": ("three_leaps", {})},
        (("reward", "2", "1"), ("reward", "2", "3")),
        "Fig. 5",
    ),
    "reward of": Ablation({"x̂_0": ("reward_on_leap", {}), "x_0": OWN}, (("reward", "x_0", "x̂_0"),), "Fig. 6"),
    "weight": Ablation(
        {"none": ("weight_none", {}), "d_j": ("weight_d_j", {}), "d_0": ("weight_d_0", {}), "both": OWN},
        (("reward", "both", "none"), ("reward", "both", "d_j"), ("reward", "both", "d_0")),
        "Fig. 7",
    ),
    "timesteps": Ablation({"[0, 1/2]": ("leap_align", {"high": 12}), "[0, 1]": OWN},
                          (("reward", "[0, 1]", "[0, 1/2]"),), "Fig. 8"),
    "k - j": Ablation(
        {"1": ("apart_1", {}), "6": ("apart_6", {}), "12": ("apart_12", {}), "18": ("apart_18", {}), "random": OWN},
        tuple(("reward", "random", distance) for distance in ("1", "6", "12", "18")),
        "Fig. 9",
    ),
    "nested only, alpha": Ablation(
        {f"{alpha:g}": ("nested_only", {"alpha": alpha}) for alpha in (0.0, 0.3, 1.0)},
        (("reward", "0.3", "0"), ("reward", "0", "1"), ("grad_norm", "1", "0"), ("grad_norm", "1", "0.3")),
        "supplement's Fig. 2",
        ema=0.0,
    ),
    "lambda": Ablation(
        {"-2": ("leap_align", {"lam": -2.0}), "-1": ("leap_align", {"lam": -1.0}), "0": OWN,
         "1": ("leap_align", {"lam": 1.0}), "none": ("leap_align", {"lam": None})},
        (("reward", "0", "-2"), ("utility", "0", "-2"), ("utility", "0", "none")),
        "supplement's Table 2",
    ),
}  # fmt: skip


def ablations(lab: Laboratory) -> None:
    """Each part of LeapAlign exchanged or left out, at LeapAlign's own learning rate."""
    scale, runs = lab.scale, ablated(lab)
    rows = [
        {"task": task, "ablation": name, "option": option, "iterations": stop}
        | summary([run[str(stop)] for run in many])
        for (task, name, option), many in runs.items()
        for stop in scale.ablation_stops
    ]
    lab.publish("ablations", rows, ablation_text(rows, scale), [*ablation_directions(runs, scale)])
    charts.ablations(lab.out / "ablations.png", rows, scale.ablation_stops)


def ablated(lab: Laboratory) -> dict[tuple, list[dict]]:
    """(task, ablation, option) -> the evaluations of every seed's run."""
    scale, rates = lab.scale, lab.rates(("leap_align",), {"hinge": 0.0})
    keys = [(task, name, option) for task in scale.tasks for name, a in ABLATIONS.items() for option in a.options]
    settings = []
    for task, name, option in keys:
        method, changes = ABLATIONS[name].options[option]
        about = {"task": task, "method": method, "lr": rates[task, "hinge", "leap_align", "large"]}
        about |= {"stops": list(scale.ablation_stops), "hyper": {"lam": 0.0} | changes, "ema": ABLATIONS[name].ema}
        settings += [about | {"seed": seed} for seed in scale.seeds]
    found = iter(lab.runs(settings, "ablations"))
    return {key: [next(found) for _ in scale.seeds] for key in keys}


def ablation_text(rows: list[dict], scale: Scale) -> str:
    """A table for each ablation and task."""
    parts = []
    for name, ablation in ABLATIONS.items():
        said = "; ".join(f"{figure} at {greater} above {lesser}" for figure, greater, lesser in ablation.expected)
        parts.append(f"### {name}\n\nExpected from the paper ({ablation.source}): {said}.")
        for task in scale.tasks:
            some = [row for row in rows if (row["task"], row["ablation"]) == (task, name)]
            parts.append(f"{task}, n = {some[0]['n']}:")
            parts.append(markdown(some, ["option", "iterations", *FIGURES[task], "grad_norm"]))
    return "\n\n".join(parts)


def ablation_directions(runs: dict, scale: Scale):
    """What the paper found of each ablation, at both stops."""
    for name, ablation in ABLATIONS.items():
        for figure, greater, lesser in ablation.expected:
            for task in scale.tasks:
                for stop in scale.ablation_stops:
                    values = [[r[str(stop)][figure] for r in runs[task, name, option]] for option in (greater, lesser)]
                    claim = f"{name}: {greater} > {lesser}"
                    yield Direction(claim, ablation.source, task, figure, f"{stop} iterations", *values)


# ---------------------------------------------------------------------------------------------------------------------
# fidelity, pairs, memory
# ---------------------------------------------------------------------------------------------------------------------

RATE = 1e-3
"""Of the trainings between two looks at the gradient."""


def gradients(lab: Laboratory, places: list[tuple[str, int, int]]) -> dict[tuple, dict]:
    """Each method's gradient beside the true one, for (task, T, iterations of training)."""
    scale = lab.scale
    common = {"lr": RATE, "most": scale.draws, "batch": scale.batch, "smoke": scale.smoke}
    for task in scale.tasks:
        fresh(task, smoke=scale.smoke)
    # The longest first, so that no process is left with it at the end.
    order = sorted(places, key=lambda place: -place[1])
    settings = [{"task": task, "T": steps, "iterations": stage, **common} for task, steps, stage in order]
    return dict(zip(order, lab.cells.results(against_truth, settings, "gradients")))


def fidelity(lab: Laboratory) -> None:
    """Direction, length and scatter of each method's gradient, with T and over training; weights of the timesteps."""
    scale = lab.scale
    steps = T if T in scale.grids else scale.grids[-1]
    places = [(task, t, 0) for task in scale.tasks for t in scale.grids]
    places += [(task, steps, stage) for task in scale.tasks for stage in scale.stages[1:]]
    found = gradients(lab, places)
    rows, parts = [], []
    for place in places:
        about = dict(zip(("task", "T", "iterations"), place)) | {"true_norm": found[place]["norm"]}
        some = [about | {"method": name} | figures for name, figures in found[place]["methods"].items()]
        columns = ["method", "cosine", "ratio", "one_cosine", "variance", "draws", "every"]
        parts.append("### {}, T = {}, after {} iterations\n\n".format(*place) + markdown(some, columns))
        rows += some
    weights = timestep_weights(lab, steps)
    weights |= {f"leap_align x w_sim, {task}": likened(found[task, steps, 0]["pairs"], steps) for task in scale.tasks}
    table = [{"i": i + 1, **{name: values[i] for name, values in weights.items()}} for i in range(steps)]
    write_csv(lab.out / "fidelity-weights.csv", table)
    lab.publish("fidelity", rows, "\n\n".join(parts))
    charts.fidelity(lab.out / "fidelity.png", rows, table, steps)


def timestep_weights(lab: Laboratory, steps: int) -> dict[str, list[float]]:
    """What weight each method gives to every timestep, on average over its draws."""
    settings = [{"name": name, "T": steps, "most": lab.scale.draws} for name in METHODS]
    return {n: cell["weights"] for n, cell in zip(METHODS, lab.cells.results(effective_weights, settings, "weights"))}


def likened(pairs: list[list], steps: int) -> list[float]:
    """LeapAlign's effective weights when every pair counts by its mean w_sim: (k - j) at k, j at j."""
    factors, mass = [0.0] * (steps + 1), sum(weight for _, _, weight in pairs)
    for i_k, i_j, weight in pairs:
        factors[i_k] += weight / mass * (i_k - i_j) / steps
        factors[i_j] += weight / mass * i_j / steps
    return factors[1:]


SCATTERS = ("timesteps", "everything")
"""What is drawn anew where a gradient's scatter is measured."""


def pairs(lab: Laboratory) -> None:
    """One pair a batch against a pair a sample: reward at equal compute, and scatter of the gradient."""
    scale, kinds = lab.scale, ("batch", "sample")
    cost = dict(zip(kinds, lab.costs(T, [{"name": "leap_align", "pairs": kind} for kind in kinds])))
    ends = {kind: [round(n * cost["batch"] / cost[kind]) for n in scale.budgets.values()] for kind in kinds}
    runs = paired(lab, ends)
    settings = [{"task": task, "most": scale.draws, "batch": 64, "smoke": scale.smoke} for task in scale.tasks]
    scattered = dict(zip(scale.tasks, lab.cells.results(scatter, settings, "scatter")))
    rows = []
    for (task, kind), many in runs.items():
        variances = {f"variance, {what}": scattered[task][f"{kind} {what}"]["variance"] for what in SCATTERS}
        for budget, end in zip(scale.budgets, ends[kind]):
            spent = {"budget": budget, "iterations": end, "evaluations": round(end * cost[kind])}
            rows.append({"task": task, "pairs": kind} | spent | variances | summary([run[str(end)] for run in many]))
    parts = []
    for task in scale.tasks:
        columns = [
            "pairs",
            "budget",
            "iterations",
            "evaluations",
            *(f"variance, {what}" for what in SCATTERS),
            *FIGURES[task],
        ]
        title = f"### {task}, equal compute (n = {len(scale.seeds)}, mean ± standard error)\n\n"
        parts.append(title + markdown([row for row in rows if row["task"] == task], columns))
    lab.publish("pairs", rows, "\n\n".join(parts))
    charts.pairs(lab.out / "pairs.png", rows, SCATTERS)


def paired(lab: Laboratory, ends: dict[str, list[int]]) -> dict[tuple, list[dict]]:
    """(task, pairs) -> the evaluations of every seed's run, at LeapAlign's own learning rate."""
    rates = lab.rates(("leap_align",), {"hinge": 0.0})
    keys = [(task, kind) for task in lab.scale.tasks for kind in ends]
    settings = [
        {
            "task": task,
            "method": "leap_align",
            "lr": rates[task, "hinge", "leap_align", "large"],
            "seed": seed,
            "stops": ends[kind],
            "hyper": {"lam": 0.0, "pairs": kind},
        }
        for task, kind in keys
        for seed in lab.scale.seeds
    ]
    found = iter(lab.runs(settings, "pairs"))
    return {key: [next(found) for _ in lab.scale.seeds] for key in keys}


def memory(lab: Laboratory) -> None:
    """Bytes kept for backward, exact, and the gradient's length, for LeapAlign and full backpropagation as T grows."""
    scale = lab.scale
    places = [(task, t, 0) for task in scale.tasks for t in scale.grids]
    settings = [{"task": task, "T": t, "batch": scale.batch, "smoke": scale.smoke} for task, t, _ in places]
    found, rows = gradients(lab, places), []
    for place, kept in zip(places, lab.cells.results(saved, settings, "memory")):
        lengths = {"norm, full_backprop": found[place]["norm"]}
        for name in ("leap_align 0", "leap_align 0.3", "leap_align 1"):
            lengths[f"norm, {name}"] = found[place]["methods"][name]["one_norm"]
        rows.append({"task": place[0], "T": place[1]} | kept | lengths)
    parts = [f"### {t}\n\n{markdown([r for r in rows if r['task'] == t], list(rows[0])[1:])}" for t in scale.tasks]
    lab.publish("memory", rows, "\n\n".join(parts))
    charts.memory(lab.out / "memory.png", rows)


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

EXPERIMENTS: dict[str, Callable[[Laboratory], None]] = {
    "compare": compare,
    "ablations": ablations,
    "fidelity": fidelity,
    "pairs": pairs,
    "memory": memory,
}


def main(
    name: Annotated[Literal["compare", "ablations", "fidelity", "pairs", "memory", "all"], tyro.conf.Positional],
    out: Path = Path("runs/laboratory"),
    workers: int = os.cpu_count() or 1,
    smoke: bool = False,
) -> None:
    """Runs an experiment.

    Args:
        name: Which one.
        out: Folder of the tables, the figures and, in cells/, of what they are made of.
        workers: Processes that compute, one core each.
        smoke: A look at the machinery within a minute; the figures mean nothing, so give them an --out of their own.
    """
    if workers < 1:
        sys.exit(f"error: workers={workers} must be at least 1")
    lab = Laboratory(out, Cells(out / "cells", workers), SMOKE if smoke else Scale())
    try:
        for experiment in EXPERIMENTS if name == "all" else [name]:
            EXPERIMENTS[experiment](lab)
    except KeyboardInterrupt:
        sys.exit("interrupted: what is finished is kept, the same command goes on")
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
