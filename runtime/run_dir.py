"""A run's folder: files that are never half written, settings that cannot be mixed up, CSV logs."""

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leap_align import BadInput

# ---------------------------------------------------------------------------------------------------------------------
# Atomic writes
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, renamed to it at the end: a reader never sees a half-written file.

    The name holds the process id, so that two processes never write the same temporary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """The same for a folder: yields an empty one that replaces `path` at the end."""
    temporary = path.with_name(f"{path.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a CSV file atomically, with a column for every key of any row."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def digest(content: bytes | Path) -> str:
    """BLAKE2b of some bytes or of a file's content, in hexadecimal."""
    if isinstance(content, bytes):
        return hashlib.blake2b(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


def claim_run_folder(folder: Path, settings: dict[str, Any], resume: bool, changeable: frozenset[str]) -> None:
    """Writes a run's settings to config.json; refuses a folder that holds another run.

    On resume the settings must equal those of the run, apart from the `changeable` ones.  A run that stopped before
    its first checkpoint may be started again.
    """
    path, settings = folder / "config.json", _as_json(settings)
    if resume and not path.exists():
        raise BadInput(f"{path} does not exist: nothing to resume; start the run without --resume")
    if resume and (changes := _changes(_read_settings(path), settings, changeable)):
        raise BadInput(f"{folder} was run with other settings: {changes}")
    if not resume and (any((folder / "checkpoint").glob("[0-9]*")) or (folder / "result.json").exists()):
        raise BadInput(f"{folder} holds another run: choose another --out, continue with --resume, or delete it")
    _write_settings(path, settings)


def claim_output_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Writes a tool's settings to settings.json; refuses a folder that was filled with other settings."""
    path, settings = folder / "settings.json", _as_json(settings)
    if path.exists() and (changes := _changes(_read_settings(path), settings)):
        raise BadInput(f"{folder} was filled with other settings: {changes}; choose another --out")
    _write_settings(path, settings)


def check_shared_folder(folder: Path) -> None:
    """Refuses a folder that the nodes do not share: each node would keep its own part of a checkpoint."""
    if not (folder / "config.json").exists():
        raise BadInput(f"{folder} is not the same on every node: give an --out on a disk that all nodes share")


def check_not_removed(path: Path) -> None:
    """Refuses to write a file of a run's folder again after the folder was removed."""
    if not path.exists():
        raise BadInput(f"{path} is gone: the run's folder was removed during the run")


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back: paths become strings, tuples lists."""
    return json.loads(json.dumps(settings, default=str))


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise BadInput(f"{path} is damaged ({error}): the settings cannot be compared") from error


def _write_settings(path: Path, settings: dict[str, Any]) -> None:
    try:
        write_json(path, settings)
    except OSError as error:
        raise BadInput(f"cannot write to {path.parent} ({error.strerror}): choose another --out") from error


def _changes(old: dict[str, Any], new: dict[str, Any], ignored: frozenset[str] = frozenset()) -> str:
    """What differs between two settings, for an error message; empty if nothing does."""
    names = sorted(name for name in new.keys() - ignored if old.get(name) != new[name])
    return "; ".join(f"{name} was {old.get(name)}, is {new[name]}" for name in names)


# ---------------------------------------------------------------------------------------------------------------------
# Logs
# ---------------------------------------------------------------------------------------------------------------------


class CsvLog:
    """A CSV file with a row per iteration.  A resumed run keeps the rows up to its checkpoint's iteration."""

    def __init__(self, path: Path, columns: tuple[str, ...], iteration: int) -> None:
        self.path = path
        rows = [row for row in read_csv(path) if int(row["iteration"]) <= iteration] if path.exists() else []
        self.file = path.open("w", newline="")
        self.writer = csv.DictWriter(self.file, ("iteration", *columns), restval="", extrasaction="ignore")
        self.writer.writeheader()
        self.writer.writerows(rows)

    def add(self, row: dict[str, float]) -> None:
        """Appends a row; a column without a value stays empty."""
        check_not_removed(self.path)
        self.writer.writerow(row)
        self.file.flush()


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
