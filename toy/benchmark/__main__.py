"""What a training step costs: operations, memory, time, and the phases of the main job.

    python -m toy.benchmark                                     everything, about ten minutes on two cores
    python -m toy.benchmark --tasks digits --parts flops time   only these tasks and parts

The folder --out receives benchmark.png and a table for each part (`time` also writes shares.csv):

    flops.csv    operations: of the network over the floor, and of the whole step over the bare step
    memory.csv   MiB saved for backward against T: exact, each storage once, without weights
    time.csv     milliseconds of the trainer's step and of the bare step, in turns, on one thread; median of the ratios
    shares.csv   the share of each phase in the time of a step
    job.csv      seconds of `python train_leap_align.py`, from nothing and with the pre-trained networks in the cache

A table that is measured again is replaced: give another --out to keep both.
"""

import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import tyro
from tqdm import tqdm

from leap_align import BadInput
from runtime.run_dir import claimed_output_folder, write_csv
from toy.benchmark.main_job import measure_main_job
from toy.benchmark.memory import measure_memory
from toy.benchmark.operations import measure_operations
from toy.benchmark.plot import plot
from toy.benchmark.step_time import measure_step_time
from toy.benchmark.tasks import TASKS, TINY_PIPELINES, Row, make_tiny_pipelines
from toy.summary import markdown_table


@dataclass(frozen=True)
class Options:
    """What to measure, and where to write it."""

    out: Path = Path("runs/benchmark")
    """Folder for the tables (CSV) and the figure."""
    tasks: tuple[str, ...] = TASKS
    """Some of toy, digits, flux and sd3; the last two are tiny random pipelines and need diffusers."""
    parts: tuple[str, ...] = ("flops", "memory", "time", "job")
    """Some of flops, memory, time (with shares) and job."""
    seconds: float = 60.0
    """How long each task's step is timed against its bare step."""


def check(options: Options) -> list[str]:
    """Refuses unknown options; returns the tasks to measure, without those that cannot run here."""
    for flag, known in (("tasks", TASKS), ("parts", Options.parts)):
        if unknown := sorted(set(getattr(options, flag)) - set(known)):
            raise BadInput(f"unknown {flag} {', '.join(unknown)}: choose from {', '.join(known)}")
    if not 0 < options.seconds < float("inf"):
        raise BadInput(f"seconds={options.seconds} must be positive")
    names = [name for name in options.tasks if name not in TINY_PIPELINES or find_spec("diffusers")]
    if left_out := [name for name in options.tasks if name not in names]:
        print(f"{', '.join(left_out)}: left out, because diffusers is not installed")
    return names


def measure(options: Options, names: list[str], folder: Path) -> dict[str, list[Row]]:
    """Every part of every task, as tables.  They are written after each task, so an interruption keeps them.

    folder: where the tiny pipelines are, and where the main jobs run.
    """
    tables: dict[str, list[Row]] = defaultdict(list)
    for name in tqdm(names, "tasks"):
        if "flops" in options.parts:
            tables["flops"] += measure_operations(name, folder)
        if "memory" in options.parts:
            tables["memory"] += measure_memory(name, folder)
        if "time" in options.parts:
            time_row, shares_row = measure_step_time(name, folder, options.seconds)
            tables["time"].append(time_row)
            tables["shares"].append(shares_row)
        if "job" in options.parts and name not in TINY_PIPELINES:
            tables["job"] += measure_main_job(name, folder)
        for table, rows in tables.items():
            write_csv(options.out / f"{table}.csv", rows)
    return tables


def main(options: Options) -> None:
    """Measures, writes the tables and the figure, prints the tables."""
    names = check(options)
    with claimed_output_folder(options.out, "toy.benchmark", {}), tempfile.TemporaryDirectory() as folder:
        make_tiny_pipelines([name for name in names if name in TINY_PIPELINES], Path(folder))
        tables = measure(options, names, Path(folder))
        if tables:
            plot(tables, options.out)
    for name, rows in tables.items():
        columns = dict.fromkeys(column for row in rows for column in row if not column.endswith("_error"))
        print(f"\n{name}\n\n{markdown_table(rows, list(columns))}")
    if tables:
        print(f"\ntables and figure are in {options.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the tables of the finished tasks are kept")
