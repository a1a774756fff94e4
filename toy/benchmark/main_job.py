"""Seconds of the main job, `python train_leap_align.py --task NAME`, and of its phases.

`python -m toy.benchmark.main_job TASK OUT CACHE START [flags]` runs the job in its own process, so that its seconds
include the start of Python and the import of torch.
"""

import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

import train_leap_align
from runtime import report
from runtime.run_dir import write_json
from toy import pretrain
from toy.benchmark.stopwatch import Stopwatch
from toy.benchmark.tasks import Row, run_module
from train_leap_align import Trainer

PHASES = ("import", "build", "pre-training", "training", "evaluations", "checkpoints", "pictures", "other")
"""Phases of the main job."""


def measure_main_job(name: str, folder: Path, *flags: str) -> list[Row]:
    """Two rows: the first run pre-trains the networks, the second finds them in the cache.

    flags: more flags of train_leap_align.py.
    """
    rows = []
    for run in tqdm(("first", "second"), f"{name}: main job", leave=False):
        out = folder.resolve() / f"{name}-{run}"
        cache = folder.resolve() / "cache"
        run_module("toy.benchmark.main_job", name, str(out), str(cache), str(time.time()), *flags)
        seconds = json.loads((out / "seconds.json").read_text())
        rows.append({"task": name, "run": run, "seconds": sum(seconds.values()), **seconds})
    return rows


def run_main_job(name: str, out: Path, cache: Path, start: float, flags: list[str]) -> None:
    """Runs the main job with its phases timed, and writes their seconds to out/seconds.json.

    start: time.time() before this process started.  Replaces functions permanently: run it in its own process.
    """
    pretrain.CACHE = cache
    task_class = train_leap_align.task_class(name)
    stopwatch = Stopwatch()
    stopwatch.seconds["import"] = time.time() - start
    timed_functions = [
        (train_leap_align, "build_task", "build"),
        (Trainer, "__init__", "build"),
        (task_class, "pretrain", "pre-training"),
        (Trainer, "step", "training"),
        (Trainer, "evaluate", "evaluations"),
        (Trainer, "save", "checkpoints"),
        (report, "draw_curves", "pictures"),
        (task_class, "draw_figures", "pictures"),
    ]
    for owner, function, phase in timed_functions:
        setattr(owner, function, stopwatch.phase(phase)(getattr(owner, function)))
    train_leap_align.main(["--task", name, "--out", str(out), *flags])
    stopwatch.seconds["build"] -= stopwatch.seconds["pre-training"]  # build_task calls it
    stopwatch.seconds["other"] = time.time() - start - sum(stopwatch.seconds.values())
    write_json(out / "seconds.json", {phase: stopwatch.seconds[phase] for phase in PHASES})


if __name__ == "__main__":
    name, out, cache, start, *flags = sys.argv[1:]
    run_main_job(name, Path(out), Path(cache), float(start), flags)
