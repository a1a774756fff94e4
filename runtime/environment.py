"""What the processes of a run must have in common besides their flags and files."""

import os
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from runtime.exit import PACKAGES
from runtime.files import digest
from runtime.processes import world_size
from runtime.task import Task

STANDARD_LIBRARY = sysconfig.get_path("stdlib") + os.sep


def environment(task: type[Task]) -> dict[str, str]:
    """Processes a node, kind of device, versions of packages, and `sources`, by name; of a single process nothing."""
    if world_size() == 1:
        return {}
    node = {"processes a node": os.environ.get("LOCAL_WORLD_SIZE", "1"), "device": task.choose_device().type}
    return node | {name: _version(name) for name in ("torch", "numpy", *PACKAGES.values())} | sources()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def sources() -> dict[str, str]:
    """A short digest of the code of each imported module that was not installed; for a single process nothing."""
    if world_size() == 1:
        return {}
    files = {name: getattr(module, "__file__", None) or "" for name, module in list(sys.modules.items())}
    return {f"code of {name}": digest(Path(file))[:8] for name, file in files.items() if _is_own(file)}


def _is_own(file: str) -> bool:
    is_installed = file.startswith(STANDARD_LIBRARY) or "/site-packages/" in file or "/dist-packages/" in file
    return file.endswith(".py") and not is_installed and os.path.isfile(file)  # some modules only claim to have one
