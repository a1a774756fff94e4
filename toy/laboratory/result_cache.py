"""A cache of results: a function of JSON settings is computed once, on several processes; experiments share results."""

import json
import signal
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from leap_align import BadInput
from runtime.files import digest, read_json, write_json

Function = Callable[..., dict]  # of JSON, to JSON; worker processes must be able to import it
Settings = dict[str, Any]
Key = TypeVar("Key", bound=Hashable)


def cache_path(folder: Path, function: Function, settings: Settings) -> Path:
    """folder/FUNCTION-DIGEST.json, with the digest of the settings."""
    text = json.dumps(settings, sort_keys=True)
    return folder / f"{function.__name__}-{digest(text.encode())[:16]}.json"


def compute(path: Path, function: Function, settings: Settings) -> None:
    """Computes function(**settings) and writes the result with its settings."""
    write_json(path, {"function": function.__name__, "settings": settings, "result": function(**settings)})


def stored_result(path: Path) -> dict | None:
    """The result in a file, or None if there is none; a damaged file is removed."""
    if not path.exists():
        return None
    with suppress(BadInput, KeyError):
        return read_json(path)["result"]
    tqdm.write(f"{path} is damaged: it is removed, and its result is computed again")
    path.unlink()
    return None


@dataclass(frozen=True)
class ResultCache:
    """The folder of the results, and the number of processes that compute missing ones."""

    folder: Path
    workers: int

    def results(self, function: Function, settings: dict[Key, Settings], title: str) -> dict[Key, dict]:
        """function(**s) for each key's settings s; the title is that of the progress bar."""
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = {key: cache_path(self.folder, function, s) for key, s in settings.items()}
        missing = {path: settings[key] for key, path in paths.items() if stored_result(path) is None}
        with tqdm(total=len(missing), desc=title, unit="result", mininterval=1, disable=not missing) as bar:
            for _ in self._compute_each(function, missing):
                bar.update()
        return {key: stored_result(path) for key, path in paths.items()}

    def _compute_each(self, function: Function, missing: dict[Path, Settings]) -> Iterator[None]:
        """Computes the missing results, and yields after each."""
        if self.workers == 1 or len(missing) < 2:
            for path, settings in missing.items():
                yield compute(path, function, settings)
            return
        # Spawned, because a forked child would inherit torch's threads in an unknown state.
        # Only the parent handles Ctrl-C: workers ignore it from their first import on and finish their result.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        pool = ProcessPoolExecutor(self.workers, get_context("spawn"))
        futures = [pool.submit(compute, path, function, s) for path, s in missing.items()]
        signal.signal(signal.SIGINT, handler)
        try:
            for future in as_completed(futures):
                yield future.result()  # raises what the worker raised
        finally:
            pool.shutdown(cancel_futures=True)
