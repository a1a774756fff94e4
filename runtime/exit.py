"""How a process ends: the errors that a user can act on, and the one line for each."""

import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from leap_align import BadInput
from runtime.processes import (
    RaisedOnAllRanks,
    StoppedBySignal,
    UserCodeError,
    is_in_group,
    one_line,
    out_of_memory_reason,
    printable,
)

PACKAGES = {name: name for name in "diffusers transformers peft accelerate sentencepiece safetensors".split()}
PACKAGES |= {name: name for name in "torchvision tokenizers huggingface_hub matplotlib hpsv2 psutil".split()}
PACKAGES |= {"sklearn": "scikit-learn", "open_clip": "open_clip_torch"}
"""Packages that requirements.txt installs, by the name under which Python imports them."""


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Raises UserCodeError(what) from any error of the code inside, apart from those that have a line of their own."""
    try:
        yield
    except (BadInput, UserCodeError, StoppedBySignal, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise UserCodeError(what) from error.with_traceback(error.__traceback__.tb_next)  # without this frame


REPORTED = (BadInput, UserCodeError, StoppedBySignal, ImportError, OSError, RuntimeError, MemoryError)
"""Errors that a program gives to exit_process."""


def exit_process(error: BaseException | None, continue_with: str, out_of_memory: str) -> None:
    """Ends the process: one line on stderr if there is an error, and the exit status that fits it.

    continue_with, out_of_memory: what a user can do after a failure, and when memory runs out.  In a group a failed
    process exits at once.  Destroying the process group would wait for ranks that wait for this one, and gloo's threads
    sometimes abort a regular interpreter exit (SIGABRT).
    """
    if dist.is_initialized() and not (is_in_group() and error is not None):
        dist.destroy_process_group()
    message = "" if error is None else _message(error, continue_with, out_of_memory)
    # The shell's convention: 128 + n for signal n.
    status = 128 + error.signal if isinstance(error, StoppedBySignal) else int(error is not None)
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # otherwise the message would follow an unfinished progress bar on the same line
    if is_in_group():
        _exit_in_group(error, message, status)
    if isinstance(error, StoppedBySignal):
        print(message, file=sys.stderr)
        sys.exit(status)
    if error is not None:
        sys.exit(message)


def _exit_in_group(error: BaseException | None, message: str, status: int) -> None:
    is_common = isinstance(error, RaisedOnAllRanks | StoppedBySignal)
    message = message if is_common else f"{message} (rank {os.environ['RANK']} on {socket.gethostname()})"
    if error is not None and (int(os.environ["RANK"]) == 0 or not is_common):
        print(message, file=sys.stderr)
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun shows its message in a table at the end
            content = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
            with suppress(OSError):
                Path(path).write_text(json.dumps({"message": content}))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _message(error: BaseException, continue_with: str, out_of_memory: str) -> str:
    """The line for an error that a user can act on; any other error is raised again, with its traceback."""
    if isinstance(error, StoppedBySignal):
        outcome = f"progress is saved: {continue_with}" if error.is_saved else "nothing new was saved"
        return f"stopped by {signal.Signals(error.signal).name}, {outcome}"
    if reason := out_of_memory_reason(error):  # also where it was taken for a damaged file
        return f"error: out of memory ({reason}): {out_of_memory}"
    if isinstance(error, BadInput):
        return f"error: {printable(error)}"
    if isinstance(error, UserCodeError):
        cause, lines = error.__cause__, "".join(traceback.format_exception(error.__cause__)).rstrip().split("\n")
        first = f"error: {printable(error)} raised {type(cause).__name__}: {one_line(cause)}; its traceback:"
        return "\n".join([first, *map(printable, lines)])
    if package := _missing_package(error):
        return f"error: {package} is not installed: pip install -r requirements.txt"
    if isinstance(error, OSError):
        return f"error: {printable(error.filename or 'writing a file')}: {one_line(error)}; then {continue_with}"
    if isinstance(error, dist.DistError) or (dist.is_initialized() and "gloo" in str(error)):
        return f"error: {_group_failure(error, continue_with)}"
    raise error


def _group_failure(error: BaseException, continue_with: str) -> str:
    """What an error of torch.distributed means, its message, and what helps."""
    cause, address, port = one_line(error), os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if "EADDRINUSE" in str(error):
        return f"port {port} is in use ({cause}): set another MASTER_PORT, with torchrun --master_port"
    if "/dev/shm" in str(error):
        return f"/dev/shm is too small for NCCL ({cause}): docker run --shm-size=8g, or set NCCL_SHM_DISABLE=1"
    if not dist.is_initialized():
        return f"no contact at {address}, port {port} ({cause}): start all processes, and open this port on that node"
    if re.search("timed? ?out", str(error), re.IGNORECASE):
        slow = "if it was only slow, raise --process-group-timeout"
        return f"waited too long for another process ({cause}): {continue_with}; {slow}"
    return f"lost another process ({cause}): {continue_with}"


def _missing_package(error: BaseException | None) -> str | None:
    """The package that an import did not find; diffusers and transformers raise errors of their own from that one."""
    while error is not None:
        name = str(getattr(error, "name", None)).split(".")[0]
        if isinstance(error, ModuleNotFoundError) and name in PACKAGES and find_spec(name) is None:
            return PACKAGES[name]
        error = error.__cause__ or error.__context__
    return None
