"""The paper's comparison and ablations on the toys, and each method's gradient compared with the true one.

    python -m toy.laboratory compare      every method, learning rates tuned, at equal samples and at equal compute
    python -m toy.laboratory ablations    LeapAlign with one part replaced or removed
    python -m toy.laboratory fidelity     each method's gradient compared with the true one
    python -m toy.laboratory pairs        one pair of timesteps a batch, as in the paper, or one pair a sample
    python -m toy.laboratory leash        the leash to the pre-trained model, the hinge, and early stopping
    python -m toy.laboratory beyond       later methods, over T and solver, and policy gradient
    python -m toy.laboratory guidance     classifier-free guidance, its branch without a prompt with or without gradient
    python -m toy.laboratory memory       bytes saved for backward, and the gradient's norm, as T grows
    python -m toy.laboratory cost         evaluations, operations, bytes and time of a step beside its lower bound
    python -m toy.laboratory shapes       the methods on a small FLUX.1 that draws shapes; needs diffusers
    python -m toy.laboratory all          all of them

Each experiment writes NAME.csv, NAME.md and, but for guidance, NAME.png into the output folder, and NAME-directions.csv
where the paper states a direction.  All results are kept in the folder cache/ there: an experiment that was stopped
continues where it stopped, and a finished one only draws its tables and figure again.  Delete the folder after a change
of the code.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from leap_align import BadInput, require
from runtime.processes import init_process_group, world_size
from runtime.run_dir import claimed_output_folder
from toy.laboratory import ablations, beyond, compare, cost, gradient_experiments, guidance, leash, shapes
from toy.laboratory.laboratory import SMOKE, Laboratory, Scale
from toy.laboratory.result_cache import ResultCache

EXPERIMENTS: dict[str, Callable[[Laboratory], None]] = {
    "compare": compare.run,
    "ablations": ablations.run,
    "fidelity": gradient_experiments.fidelity,
    "pairs": gradient_experiments.pairs,
    "leash": leash.run,
    "beyond": beyond.run,
    "guidance": guidance.run,
    "memory": gradient_experiments.memory,
    "cost": cost.run,
    "shapes": shapes.run,
}
ALL = tuple(EXPERIMENTS)


def main(
    name: Annotated[Literal[*EXPERIMENTS, "all"], tyro.conf.Positional],
    out: Path = Path("runs/laboratory"),
    workers: int = os.cpu_count() or 1,
    smoke: bool = False,
) -> None:
    """Runs an experiment.

    Args:
        name: The experiment, or all of them.
        out: Folder of the tables, the figures and, in cache/, the results that they are made of.
        workers: Processes that compute, one core each.
        smoke: Check in a few minutes that everything runs.  Its results mean nothing: it needs an --out of its own.
    """
    if workers < 1:
        sys.exit(f"error: workers={workers} must be at least 1")
    lab = Laboratory(out, ResultCache(out / "cache", workers), SMOKE if smoke else Scale())
    try:
        init_process_group()
        require(world_size() == 1, "the laboratory starts its own --workers: start it once, without a launcher")
        with claimed_output_folder(out, "toy.laboratory", {"scale": "smoke" if smoke else "full"}):
            for experiment in ALL if name == "all" else [name]:
                EXPERIMENTS[experiment](lab)
    except KeyboardInterrupt:
        sys.exit("interrupted: finished results are kept, and the same command continues from them")
    except (BadInput, ImportError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
