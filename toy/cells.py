"""Cells: the pieces that an experiment is made of, each computed once.

A cell is a function's result for settings that JSON can hold.  It is kept in a file that its settings name, so that an
experiment that was stopped goes on with the cells that it lacks, and experiments share what they have in common.
"""

import hashlib
import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

Cell = Callable[..., dict]


def file_of(folder: Path, cell: Cell, settings: dict[str, Any]) -> Path:
    """folder/NAME-digest.json."""
    text = json.dumps(settings, sort_keys=True)
    return folder / f"{cell.__name__}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def compute(path: Path, cell: Cell, settings: dict[str, Any]) -> None:
    """Computes one cell and renames its file into place: there is all of it or nothing."""
    result = cell(**settings)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({"cell": cell.__name__, "settings": settings, "result": result}, indent=1) + "\n")
    os.replace(part, path)


@dataclass(frozen=True)
class Cells:
    """Where cells are kept, and how many processes compute those that are missing."""

    folder: Path
    workers: int

    def results(self, cell: Cell, settings: list[dict[str, Any]], title: str) -> list[dict]:
        """cell(**s) of each s in settings, in their order."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files = [file_of(self.folder, cell, s) for s in settings]
        missing = {file: s for file, s in zip(files, settings) if not file.exists()}
        with tqdm(total=len(missing), desc=title, unit="cell", disable=not missing) as bar:
            for _ in self._each(cell, missing):
                bar.update()
        return [json.loads(file.read_text())["result"] for file in files]

    def _each(self, cell: Cell, missing: dict[Path, dict]):
        """Computes the missing cells, and yields after each."""
        if self.workers == 1 or len(missing) < 2:
            for file, settings in missing.items():
                yield compute(file, cell, settings)
            return
        # Spawned: a forked child would inherit torch's threads in whatever state they are.
        # Ctrl-C is the parent's: from the first import on they ignore it, finish their cell, and end.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        pool = ProcessPoolExecutor(self.workers, get_context("spawn"))
        tasks = [pool.submit(compute, file, cell, s) for file, s in missing.items()]
        signal.signal(signal.SIGINT, before)
        try:
            for done in as_completed(tasks):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)
