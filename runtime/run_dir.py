"""A run's folder: who may write into it, on which disks, settings that cannot be mixed up, CSV logs."""

import csv
import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Collection, Iterator, Set
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from leap_align import BadInput, require
from runtime.files import (
    UNSUPPORTED,
    atomic_file,
    disk_remedy,
    fsync,
    numbered,
    read_csv,
    read_json,
    write_errors_named,
    write_text,
)
from runtime.processes import all_gather, check_same, printable, run_on_all_ranks, run_on_rank0


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
    if changes := differences(read_json(folder / "config.json"), settings, changeable):
        remedy = "give those, start a run in another --out, or see --allow-changed in --help"
        raise BadInput(f"{folder} was run with other settings: {changes}; {remedy}")


def check_contents(folder: Path, contents: dict[str, str]) -> None:
    """Refuses to resume a run when the content of a file that it reads has changed."""
    old = read_json(folder / "config.json").get("contents")
    require(isinstance(old, dict), f"{folder / 'config.json'} is damaged (no `contents`): restore it")
    changed = ", ".join(sorted(name for name in contents if old.get(name) != contents[name]))
    require(not changed, f"{changed} changed since {folder} was started: restore it, or choose another --out")


def record_run(
    folder: Path, settings: dict[str, Any], contents: dict[str, str], changes: list[Any], unread: Collection[str]
) -> None:
    """Writes config.json.

    unread: the settings that a resumed run does not use; they, and the contents of their files, stay recorded.
    """
    old = read_json(folder / "config.json") if unread else {}
    settings = settings | {name: old.get(name) for name in unread}
    contents = {name: old["contents"][name] for name in unread if name in old["contents"]} | contents
    write_settings(folder / "config.json", settings | {"contents": contents, "changes": changes})


def write_settings(path: Path, settings: dict[str, Any]) -> None:
    """Writes settings as JSON."""
    try:
        write_text(path, json.dumps(settings, indent=2, default=str) + "\n")
    except OSError as error:
        remedy = f"{disk_remedy(error.strerror)}, or choose another --out"
        raise BadInput(f"cannot write {path} ({error.strerror}): {remedy}") from error


@contextmanager
def claimed_output_folder(folder: Path, tool: str, settings: dict[str, Any]) -> Iterator[None]:
    """A tool's folder, locked while the context lasts, with its settings in settings.json; every rank calls it.

    Settings that only rank 0 has count, too.
    Refuses a folder that is not new, empty or filled by this tool with the same settings.
    """
    path, settings = folder / "settings.json", {"tool": tool, **settings}
    check_same(settings)

    def check_and_write() -> None:
        changes = path.exists() and differences(read_json(path), settings)
        require(not changes, f"{folder} was filled with other settings: {changes}; choose another folder")
        write_settings(path, settings)

    with locked_folder(folder, path.name, tool):
        run_on_rank0(check_and_write)
        yield


def check_not_removed(path: Path) -> None:
    """Refuses to write a file of a run's folder again after the folder was removed."""
    require(path.exists(), f"{path} is gone: the run's folder was removed during the run")


LOCK = ".lock"  # the file in a folder that the process which writes into it has locked


@contextmanager
def locked_folder(folder: Path, settings_file: str, tool: str) -> Iterator[None]:
    """Rank 0 locks the folder while the context lasts; every rank calls it.  A process that dies leaves no lock.

    Refuses a folder with content that is not the tool's, whose settings file has "tool": tool, a folder with links,
    and a disk that does not do what a run needs.
    """
    with ExitStack() as locks:
        run_on_rank0(lambda: _lock_own(locks, folder, folder / settings_file, tool))
        run_on_rank0(lambda: _check_no_links(folder))
        _check_disk(folder)
        yield


# What a process that died before it wrote its settings may have left, and what operating systems leave.
LEFT = re.compile(r"\.lock.*|(config|settings)\.json\.\d+\.part|\._.*|\.DS_Store|Thumbs\.db|desktop\.ini|@eaDir")


def _lock_own(locks: ExitStack, folder: Path, settings_file: Path, tool: str) -> None:
    require(
        printable(folder) == str(folder),
        f"{str(folder)!a} has characters that cannot be printed: choose another folder",
    )
    require(folder.is_dir() or not folder.exists(), f"{folder} is a file: choose another folder")
    own = settings_file.is_file() and read_json(settings_file).get("tool") == tool
    own = own or not folder.exists() or all(LEFT.fullmatch(file.name) for file in folder.iterdir())
    require(own, f"{folder} is not empty, and {tool} did not fill it: choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _lock(locks, folder)
    except OSError as error:
        path = error.filename or folder
        raise BadInput(f"cannot write to {path} ({error.strerror}): choose another --out") from error


def _lock(locks: ExitStack, folder: Path) -> None:
    lock, advice = FileLock(folder / LOCK, blocking=False, fallback_to_soft=False), ""
    try:
        try:
            locks.enter_context(lock)
        except OSError as error:
            if error.errno not in (*UNSUPPORTED, errno.ENOLCK):
                raise
            # A disk without locks: a file that names its process, and is replaced once that has ended on this host.
            lock = SoftFileLock(folder / f"{LOCK}.soft", blocking=False)
            advice = f"; if process {lock.pid} has ended on its host, delete {lock.lock_file}"
            locks.enter_context(lock)
    except Timeout as error:
        remedy = f"wait until it ends, or choose another --out{advice}"
        raise BadInput(f"{folder} is in use by another process: {remedy}") from error


def _check_no_links(folder: Path) -> None:
    """Refuses links and devices in a folder: what is written there would end elsewhere."""
    for parent, folders, files in os.walk(folder):
        if "wandb" in folders and Path(parent) == folder and not (folder / "wandb").is_symlink():
            folders.remove("wandb")  # it links to its newest log
        for path in (Path(parent, name) for name in (*folders, *files)):
            mode = path.lstat().st_mode
            require(stat.S_ISREG(mode) or stat.S_ISDIR(mode), f"{path} is a link or a device: move it out of {folder}")


def _check_disk(folder: Path) -> None:
    """Refuses a disk that cannot do what a run needs, or that the nodes do not share; every rank calls it.

    A node with a disk of its own would keep its own part of a checkpoint.
    """
    nonce = all_gather(secrets.token_hex(8))[0]
    probe = folder / f"{LOCK}.{nonce}"  # a new name, because network disks remember that a file was missing

    def write() -> None:
        try:
            with atomic_file(probe) as temporary, temporary.open("w") as file:
                file.write(nonce)
                file.flush()
                fsync(temporary)  # which reads a file that is being written, as a checkpoint reads the log
        except OSError as error:
            fault = f"the disk of {folder} cannot write, read back and rename a file ({error.strerror})"
            raise BadInput(f"{fault}: choose an --out on another disk") from error

    def read() -> None:
        is_shared = probe.is_file() and probe.read_text() == nonce
        require(is_shared, f"{folder} is not the same on every node: give an --out on a disk that all nodes share")

    run_on_rank0(write)
    try:
        run_on_all_ranks(read)
    finally:
        run_on_rank0(lambda: probe.unlink(missing_ok=True))


def checkpoint_folders(folder: Path) -> list[Path]:
    """The folders of a run's checkpoints, finished or not, the newest last."""
    return [path for path in numbered(folder / "checkpoint").values() if path.is_dir()]


def checkpoints(folder: Path) -> list[Path]:
    """A run's finished checkpoints, the newest last: state.json is written last."""
    return [path for path in checkpoint_folders(folder) if (path / "state.json").exists()]


def differences(old: dict[str, Any], settings: dict[str, Any], ignored: Set[str] = frozenset()) -> str:
    """How settings differ from those of a JSON file, for a message; empty if they are equal."""
    new = json.loads(json.dumps(settings, default=str))  # paths become strings, tuples lists
    names = sorted(name for name in new.keys() - ignored if old.get(name) != new[name])
    return "; ".join(f"{name} was {old.get(name)}, is {new[name]}" for name in names)


# -------------------------------------------------------- Logs -------------------------------------------------------
class CsvLog:
    """A CSV file with a row per iteration.  A resumed run keeps the rows up to its checkpoint's iteration."""

    def __init__(self, path: Path, columns: tuple[str, ...], iteration: int) -> None:
        self.path = path
        rows = read_csv(path, ("iteration", *columns)) if iteration and path.exists() else []
        try:
            rows = [row for row in rows if int(row["iteration"]) <= iteration]
        except (ValueError, TypeError) as error:
            raise BadInput(f"{path} has a damaged row ({error}): move it away, or choose another --out") from error
        path.unlink(missing_ok=True)  # a copy of the folder by hard links keeps its log
        self.file = path.open("w", newline="")
        self.writer = csv.DictWriter(self.file, ("iteration", *columns), restval="", extrasaction="ignore")
        self.writer.writeheader()
        self.writer.writerows(rows)
        self.file.flush()

    def add(self, row: dict[str, float]) -> None:
        """Appends a row; a column without a value stays empty."""
        check_not_removed(self.path)
        with write_errors_named(self.path):
            self.writer.writerow(row)
            self.file.flush()
