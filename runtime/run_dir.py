"""A run's folder: files that are never half written, settings that cannot be mixed up, CSV logs."""

import csv
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from leap_align import BadInput, require
from runtime.processes import check_same, one_line, run_on_rank0


# --------------------------------------------------- Atomic writes ---------------------------------------------------
@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, renamed to it at the end: a reader never sees a half-written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")  # one for each process
    try:
        with write_errors_named(path):
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
    try:
        with write_errors_named(path):
            yield temporary
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def write_errors_named(path: Path) -> Iterator[None]:
    """Adds this path to an operating system's error that names no file, such as a full disk's."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except Exception as error:
        # Libraries written in Rust, such as safetensors, raise classes of their own.
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(text.encode())


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


def digest_files(folder: Path, files: Iterable[Path]) -> str:
    """One digest of the names, from the folder on, and the contents of files."""
    total = hashlib.blake2b()
    for path in tqdm(sorted(files), f"reading {folder}", leave=False, delay=2, mininterval=1):
        total.update(f"{path.relative_to(folder)} {digest(path)}\n".encode())
    return total.hexdigest()


# -------------------------------------------- Who may write into a folder --------------------------------------------
def check_run_folder(folder: Path, settings: dict[str, Any], resume: bool, changeable: frozenset[str]) -> None:
    """Refuses a folder with another run.  Writes nothing.

    On resume only the `changeable` settings may differ.  Without a checkpoint a run starts, with or without resume.
    """
    if not checkpoints(folder):
        is_new = not (folder / "result.json").exists()
        require(is_new, f"{folder} holds a finished run without its checkpoints: choose another --out, or delete it")
        return
    require(resume, f"{folder} holds another run: choose another --out, continue with --resume, or delete it")
    if changes := _changes(folder / "config.json", settings, changeable):
        raise BadInput(f"{folder} was run with other settings: {changes}; give those, or start a run in another --out")


def check_contents(folder: Path, contents: dict[str, str]) -> None:
    """Refuses to resume a run when the content of a file that it reads has changed."""
    old = read_json(folder / "config.json").get("contents", {})
    changed = ", ".join(sorted(name for name in contents if old.get(name) != contents[name]))
    require(not changed, f"{changed} changed since {folder} was started: restore it, or choose another --out")


def write_settings(path: Path, settings: dict[str, Any]) -> None:
    """Writes settings as JSON."""
    try:
        write_text(path, json.dumps(settings, indent=2, default=str) + "\n")
    except OSError as error:
        raise BadInput(f"cannot write {path} ({error.strerror}): free some space, or choose another --out") from error


@contextmanager
def claimed_output_folder(folder: Path, tool: str, settings: dict[str, Any]) -> Iterator[None]:
    """A tool's folder, locked while the context lasts, with its settings in settings.json; every rank calls it.

    Settings that only rank 0 has count, too.
    Refuses a folder that is not new, empty or filled by this tool with the same settings.
    """
    path, settings = folder / "settings.json", {"tool": tool, **settings}
    check_same(settings)

    def check_and_write() -> None:
        changes = path.exists() and _changes(path, settings)
        require(not changes, f"{folder} was filled with other settings: {changes}; choose another folder")
        write_settings(path, settings)

    with locked_folder(folder, path.name, tool):
        run_on_rank0(check_and_write)
        yield


def check_shared_folder(folder: Path) -> None:
    """Refuses a folder that the nodes do not share: each node would keep its own part of a checkpoint."""
    shared = (folder / LOCK).exists()
    require(shared, f"{folder} is not the same on every node: give an --out on a disk that all nodes share")


def check_not_removed(path: Path) -> None:
    """Refuses to write a file of a run's folder again after the folder was removed."""
    require(path.exists(), f"{path} is gone: the run's folder was removed during the run")


LOCK = ".lock"  # the file in a folder that the process which writes into it has locked


@contextmanager
def locked_folder(folder: Path, settings_file: str, tool: str) -> Iterator[None]:
    """Rank 0 locks the folder while the context lasts; every rank calls it.  A process that dies leaves no lock.

    Refuses a folder with content that is not the tool's, whose settings file has "tool": tool.
    """
    lock = FileLock(folder / LOCK, blocking=False)
    run_on_rank0(lambda: _lock_own(lock, folder, folder / settings_file, tool))
    try:
        yield
    finally:
        lock.release()


def _lock_own(lock: FileLock, folder: Path, settings_file: Path, tool: str) -> None:
    require(folder.is_dir() or not folder.exists(), f"{folder} is a file: choose another folder")
    own = settings_file.is_file() and read_json(settings_file).get("tool") == tool
    # What a process that died before it wrote its settings may have left, and what operating systems leave.
    left = re.compile(r"\.lock|(config|settings)\.json\.\d+\.part|\._.*|\.DS_Store|Thumbs\.db|desktop\.ini|@eaDir")
    own = own or not folder.exists() or all(left.fullmatch(file.name) for file in folder.iterdir())
    require(own, f"{folder} is not empty, and {tool} did not fill it: choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise BadInput(f"{folder} is in use by another process: wait until it ends, or choose another --out") from error
    except OSError as error:
        raise BadInput(f"cannot write to {folder} ({error.strerror}): choose another --out") from error


def checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, the newest last."""
    return [path for path in numbered(folder / "checkpoint").values() if path.is_dir()]


def numbered(folder: Path, suffix: str = "") -> dict[int, Path]:
    """Iteration -> what has its number as name, in their order.  Other names in the folder do not count."""
    paths = [path for path in folder.glob(f"*{suffix}") if re.fullmatch(r"\d{6,}", path.name.removesuffix(suffix))]
    return {int(path.stem): path for path in sorted(paths, key=lambda path: int(path.stem))}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fault = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({one_line(error)})"
        raise BadInput(f"{path} {fault}: restore it, or choose another folder") from error
    kind = type(value).__name__
    require(isinstance(value, dict), f"{path} must hold a JSON object, not a {kind}: restore it")
    return value


def _changes(path: Path, settings: dict[str, Any], ignored: frozenset[str] = frozenset()) -> str:
    """How the settings differ from those in a file, for an error message; empty if they are equal."""
    old, new = read_json(path), json.loads(json.dumps(settings, default=str))  # paths become strings, tuples lists
    names = sorted(name for name in new.keys() - ignored if old.get(name) != new[name])
    return "; ".join(f"{name} was {old.get(name)}, is {new[name]}" for name in names)


# -------------------------------------------------------- Logs -------------------------------------------------------
class CsvLog:
    """A CSV file with a row per iteration.  A resumed run keeps the rows up to its checkpoint's iteration."""

    def __init__(self, path: Path, columns: tuple[str, ...], iteration: int) -> None:
        self.path = path
        rows = read_csv(path, ("iteration", *columns)) if path.exists() else []
        try:
            rows = [row for row in rows if int(row["iteration"]) <= iteration]
        except (ValueError, TypeError) as error:
            raise BadInput(f"{path} has a damaged row ({error}): move it away, or choose another --out") from error
        self.file = path.open("w", newline="")
        self.writer = csv.DictWriter(self.file, ("iteration", *columns), restval="", extrasaction="ignore")
        self.writer.writeheader()
        self.writer.writerows(rows)
        self.file.flush()

    def add(self, row: dict[str, float]) -> None:
        """Appends a row; a column without a value stays empty."""
        check_not_removed(self.path)
        self.writer.writerow(row)
        self.file.flush()


def read_csv(path: Path, columns: tuple[str, ...] | None = None) -> list[dict[str, str]]:
    """The rows of a CSV file, which must have these columns; None allows any."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            same = columns is None or tuple(reader.fieldnames or ()) == columns
            require(same, f"{path} has other columns than a run's log: move it away, or choose another --out")
            return list(reader)
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not a CSV file: move it away, or choose another --out") from error
