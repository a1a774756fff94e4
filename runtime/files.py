"""Files: written whole or not at all, flushed, read with errors of one line; their digests."""

import csv
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from leap_align import BadInput, require
from runtime.processes import one_line, printable


# ------------------------------------------------------- Write -------------------------------------------------------
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
            try:
                os.replace(temporary, path)
            except OSError:  # gcsfuse, for example, renames files only
                path.mkdir(exist_ok=True)
                for file in temporary.iterdir():
                    os.replace(file, path / file.name)
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


def disk_remedy(reason: str) -> str:
    """What to do when a disk did not take a file, for an error message that gives this reason."""
    is_full = any(os.strerror(number) in reason for number in (errno.ENOSPC, errno.EDQUOT))
    return "free some space" if is_full else "repair the disk"


UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # what a disk answers that cannot do it


def fsync(*paths: Path) -> None:
    """Flushes files and folders to the disk, as far as this disk can: many network disks flush no folders."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (*UNSUPPORTED, errno.EBADF):
                raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            os.close(descriptor)


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


# -------------------------------------------------------- Read -------------------------------------------------------
def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    check_no_pipe(path)
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fault = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({one_line(error)})"
        raise BadInput(f"{path} {fault}: restore it, or choose another folder") from error
    kind = type(value).__name__
    require(isinstance(value, dict), f"{path} must hold a JSON object, not a {kind}: restore it")
    return value


def parse_json(text: str) -> Any:
    """The value of a text in JSON.  Raises ValueError, also for one that is nested too deeply or not Unicode."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # an escape such as \\ud800 is half a character
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


def check_no_pipe(path: Path) -> Path:
    """The path, if it is no pipe or device: those are read once, and may wait for a writer."""
    is_usual = path.is_file() or path.is_dir() or not path.exists()
    require(is_usual, f"{path} is a pipe or a device, read once: write it to a file first")
    return path


def read_csv(path: Path, columns: tuple[str, ...] | None = None) -> list[dict[str, str]]:
    """The rows of a CSV file, which must have these columns; None allows any."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            same = columns is None or tuple(reader.fieldnames or ()) == columns
            require(same, f"{path} has other columns than a run's log: move it away, or choose another --out")
            return list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path} is not a CSV file: move it away, or choose another --out") from error


def numbered(folder: Path, suffix: str = "") -> dict[int, Path]:
    """Iteration -> what has its number as name, in their order.  Other names in the folder do not count."""
    paths = [path for path in folder.glob(f"*{suffix}") if re.fullmatch(r"\d{6,}", path.name.removesuffix(suffix))]
    return {int(path.stem): path for path in sorted(paths, key=lambda path: int(path.stem))}


def digest(content: bytes | Path) -> str:
    """BLAKE2b of some bytes or of a file's content, in hexadecimal."""
    if isinstance(content, bytes):
        return hashlib.blake2b(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def digest_files(folder: Path, files: Iterable[Path]) -> str:
    """One digest of the names, from the folder on, and the contents of files."""
    total = hashlib.blake2b()
    for path in tqdm(sorted(files), f"reading {printable(folder)}", leave=False, delay=2, mininterval=1):
        total.update(f"{path.relative_to(folder)} {digest(path)}\n".encode())
    return total.hexdigest()
