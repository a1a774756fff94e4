"""Trackers in which people watch a run: TensorBoard, and Weights & Biases.

    python train_leap_align.py --tracker tensorboard        beside it: tensorboard --logdir runs
    WANDB_MODE=offline python train_leap_align.py --tracker wandb

Only rank 0 of a run with --tracker imports this module.  A tracker shows what the run's folder holds and draws nothing.
"""

import json
import os
import pkgutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from leap_align import BadInput
from runtime.files import read_csv, write_text
from runtime.processes import one_line


class Tracker(AbstractContextManager):
    """What the trackers share.  Each defines log(iteration, values), image(name, iteration, path), close(failed).

    Their iterations never descend.  A `with` statement closes a tracker, also after an error or a signal.
    """

    folder: Path

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.close(failed=kind is not None)

    def replay(self, evaluations: list[dict[str, float]]) -> None:
        """Shows metrics.csv and these evaluations: all that the run logged before it was resumed."""
        rows = [("train", row) for row in read_csv(self.folder / "metrics.csv")]
        rows += [("evaluation", evaluation) for evaluation in evaluations]
        for kind, row in sorted(rows, key=lambda item: int(item[1]["iteration"])):
            self.add(kind, int(row["iteration"]), row)

    def add(self, kind: str, iteration: int, row: Mapping[str, Any]) -> None:
        """Shows a row of metrics.csv ("train"), or an evaluation and its sheet of images, if the task drew one."""
        values = {name: float(value) for name, value in row.items() if name != "iteration" and value != ""}
        self.log(iteration, {f"{kind}/{name}": value for name, value in values.items()})
        sheet = self.folder / "samples" / f"{iteration:06d}.png"
        if kind == "evaluation" and sheet.exists():
            self.image("samples", iteration, sheet)

    def add_figures(self, iteration: int) -> None:
        """Shows the figures of a finished run."""
        for path in sorted(self.folder.glob("*.png")):
            self.image(f"figures/{path.stem}", iteration, path)


class TensorBoard(Tracker):
    """Event files in tensorboard/ of the run's folder.  They store float32."""

    library = "torch.utils.tensorboard:SummaryWriter"

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        # purge_step: what the run wrote before it was resumed is hidden, because `replay` writes it again.
        self.folder, writer = folder, pkgutil.resolve_name(self.library)
        self.writer = writer(folder / "tensorboard", purge_step=0)

    def log(self, iteration: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, iteration)
        self.writer.flush()

    def image(self, name: str, iteration: int, path: Path) -> None:
        self.writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), iteration, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self.writer.close()


class WandB(Tracker):
    """A run at Weights & Biases; with WANDB_MODE=offline, files in wandb/ of the run's folder."""

    library = "wandb:init"

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        import wandb

        id_file, self.folder, self.Image = folder / "wandb_id.txt", folder, wandb.Image
        known_id = id_file.read_text(errors="replace") if settings["resume"] and id_file.exists() else None
        names = {"project": os.environ.get("WANDB_PROJECT", settings["tool"]), "name": folder.name, "id": known_id}
        config = json.loads(json.dumps(settings, default=str))
        try:
            self.run = wandb.init(**names, dir=folder, config=config, resume="allow")
        except wandb.Error as error:
            remedy = "run `wandb login`, or set WANDB_MODE=offline"
            raise BadInput(f"wandb does not start ({one_line(error)}): {remedy}") from error
        write_text(id_file, self.run.id)

    def log(self, iteration: int, values: dict[str, Any]) -> None:
        if iteration >= self.run.starting_step:  # the service has the earlier ones from before the run was resumed
            self.run.log(values, step=iteration)

    def image(self, name: str, iteration: int, path: Path) -> None:
        self.log(iteration, {name: self.Image(str(path))})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def installed_tracker(name: str) -> type[Tracker]:
    """The class of a tracker, if its library is installed."""
    kind = {"tensorboard": TensorBoard, "wandb": WandB}[name]
    try:
        pkgutil.resolve_name(kind.library)
    except (ImportError, AttributeError) as error:  # without wandb, a folder of this name imports as an empty package
        raise BadInput(f"--tracker {name} lacks its library ({one_line(error)}): pip install {name}") from error
    return kind
