"""The small FLUX.1 that draws coloured shapes, as a task of the laboratory: judged by the kinds of its prompts."""

from pathlib import Path
from statistics import mean

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from runtime.task import EVALUATION_SEED
from train_leap_align import task_class

Flux = task_class("flux")  # imports diffusers
FOLDER = Path("full_scale/shapes/trained")


class Shapes(Flux):
    """FLUX.1 whose evaluation reports the judged share of right images of each kind of prompts."""

    name = "flux"  # of the trainer
    images_of_a_kind = 60  # in an evaluation

    def keep_reference(self) -> None:
        """Keeps one reference for all runs of a process."""
        if self.reference is None:
            super().keep_reference()

    @torch.no_grad()
    def evaluate(self, folder: Path | None, iteration: int) -> dict[str, float]:
        """Reward and diversity, the share of right images by kind, and their mean `judged`, on held-out prompts."""
        generator, judge = torch.Generator().manual_seed(EVALUATION_SEED), self.evaluator_models[0]
        by_kind: dict[str, list[str]] = {}
        for prompt in self.evaluation_prompts:
            by_kind.setdefault(next(iter(judge.summary([prompt], [0.0]))), []).append(prompt)
        rows = []
        for kind, prompts in by_kind.items():
            for prompt in prompts:
                scores, thumbnails, _ = self.evaluate_images(
                    prompt, self.noise(self.images_of_a_kind // len(prompts), generator)
                )
                diversity = (thumbnails[1:] - thumbnails[:-1]).abs().mean().item()
                rows.append({"kind": kind, "diversity": diversity, kind: scores["shapes"], **scores})
        shares = {kind: mean(row[kind] for row in rows if row["kind"] == kind) for kind in by_kind}
        others = {name: mean(row[name] for row in rows) for name in ("reward", "diversity", "shapes")}
        return {**others, **shares, "judged": mean(shares.values())}


def build(T: int, smoke: bool) -> Shapes:
    """The task, with the project's own pipeline and a reference."""
    torch.set_num_threads(1)
    options = Flux.Options(
        model=str(FOLDER), prompts=FOLDER / "prompts.txt", reward_weights=(str(FOLDER / "reward"),), held_out="shapes",
        evaluation_prompts=FOLDER / "held-out.txt", evaluation_images=12 if smoke else 78, height=32, width=32,
        evaluation_T=2 if smoke else 16, max_sequence_length=10, precision="float32", gradient_checkpointing="off",
    )  # fmt: skip
    task = Shapes(options, T)
    if smoke:
        task.images_of_a_kind = 2
    task.keep_reference()
    task.parallelize(init_device_mesh("cpu", (1,)) if dist.is_initialized() else None)  # the second task of a process
    return task
