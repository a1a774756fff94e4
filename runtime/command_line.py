"""The command line: flags made of dataclasses, the choice of task and method, and checks of their values."""

import argparse
import math
import pkgutil
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

import torch
import tyro

from leap_align import Endpoints, require, uniform_times
from runtime.task import Task, check_task_class


def choose(kind: str, name: str, table: dict[str, Any]) -> Any:
    """table[name]; an unknown name is refused with the list of known ones."""
    require(name in table, f"unknown {kind} {name!r}: choose from {', '.join(table)}")
    return table[name]


def task_class(name: str, tasks: dict[str, str]) -> type[Task]:
    """The class of a task, imported now.  tasks: name -> module:class."""
    found = pkgutil.resolve_name(choose("task", name, tasks))
    check_task_class(name, found)
    return found


def parse(
    arguments: list[str] | None,
    flags: type,
    config: type,
    hyper: type,
    tasks: dict[str, str],
    method_defaults: dict[str, dict[str, Any]],
    description: str | None,
    program: str | None,
) -> Any:
    """The command line as flags(config, hyper, options of the task), three dataclasses.

    Task, reward and method are read first, because they decide about flags and defaults.  A method's own defaults
    override those of the task, and both those of the dataclasses.
    """
    first_pass = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_pass.add_argument("--task", default=config.task)
    first_pass.add_argument("--reward")
    first_pass.add_argument("--method", default=config.method)
    chosen, _ = first_pass.parse_known_args(arguments)
    kind = task_class(chosen.task, tasks)
    defaults = {**kind.defaults(chosen.reward), **method_defaults.get(chosen.method, {})}
    defaults |= {"task": chosen.task, "method": chosen.method}
    run, method = (
        fields(**{name: value for name, value in defaults.items() if name in fields.__dataclass_fields__})
        for fields in (config, hyper)
    )
    return tyro.cli(
        Annotated[flags[kind.Options], tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff],
        args=arguments,
        default=flags(run, method, kind.Options()),
        description=description,
        prog=program,
    )


CHANGEABLE_ON_RESUME = frozenset(
    "gradient_accumulation_steps evaluate_every checkpoint_every checkpoint_minutes checkpoints_total_limit "
    "export_every async_checkpoints max_skipped_steps process_group_timeout tracker out resume allow_changed".split()
)
"""Fields of the trainer's Config that may change on --resume: no iteration depends on them."""
Allowed = Literal["lr", "lr_scheduler", "lr_warmup_steps", "iterations"]
"""Those that may change if --allow-changed names them."""


def changeable_on_resume(config: Any) -> frozenset[str]:
    """All that may change in this run; a decay of the learning rate depends on the number of iterations."""
    iterations = {"iterations"} if config.lr_scheduler == "constant" else set()
    return CHANGEABLE_ON_RESUME | iterations | set(config.allow_changed)


def allowed_changes(before: dict[str, Any], config: Any, iteration: int) -> list[dict[str, Any]]:
    """Which of `Allowed` differ from the settings before this iteration: {"iteration", name: [before, now]}."""
    found = {name: [before.get(name), getattr(config, name)] for name in get_args(Allowed)}
    found = {name: values for name, values in found.items() if values[0] != values[1]}
    return [{"iteration": iteration, **found}] if found else []


def check(config: Any, hyper: Any, method: Callable[..., Endpoints], world_size: int) -> None:
    """Refuses values of the trainer's Config and of Hyper that cannot work, before anything expensive is built."""
    counts = ("batch_size", "gradient_accumulation_steps", "evaluate_every", "checkpoint_every")
    ranges = {name: (1, 2**20) for name in (*counts, "checkpoints_total_limit", "max_skipped_steps")}
    ranges |= {"T": (2, 10_000), "iterations": (0, 2**31), "seed": (0, 2**63 - 1)}
    ranges |= {"lr": (1e-30, 1e6), "weight_decay": (0, 1e6), "max_grad_norm": (1e-30, math.inf)}
    ranges |= {"checkpoint_minutes": (0, math.inf), "lr_warmup_steps": (0, 2**20), "export_every": (0, 2**20)}
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        require(least <= value <= most, f"{name}={value} must lie between {least} and {most}")
    require(0 <= config.beta < math.inf, f"beta={config.beta} must be at least 0 and finite; 0 is no leash")
    require(0 <= config.ema_decay < 1, f"ema_decay={config.ema_decay} must lie in [0, 1)")
    is_divided = config.batch_size % (world_size * config.gradient_accumulation_steps) == 0
    parts = f"{world_size} processes x gradient_accumulation_steps={config.gradient_accumulation_steps}"
    require(is_divided, f"batch_size={config.batch_size} must be a multiple of {parts}")
    # The method itself checks its hyperparameters against T: run it once with a model that costs nothing.
    with torch.no_grad():
        list(method(lambda x, t: 0 * x, torch.zeros(1, 1), uniform_times(config.T), hyper, torch.Generator()))
